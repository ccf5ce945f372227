// What the server keeps: newest first, images and videos together.

import { call, file, json } from "./api.js";

const $ = (id) => document.getElementById(id);
const PAGE = 24;
const ends = {}; // the last id that was read, of each list
const left = { images: true, videos: true };
let waiting = []; // read, not shown yet

export async function load(open) {
  $("gallery").replaceChildren();
  waiting = [];
  for (const list of ["images", "videos"]) {
    delete ends[list];
    left[list] = true;
  }
  await more(open);
}

// A page of each list is read before anything is shown: what is newest may be in either.
export async function more(open) {
  for (const list of ["images", "videos"]) {
    if (!left[list] || waiting.some((entry) => entry.list === list)) continue;
    const after = ends[list] ? `&after=${encodeURIComponent(ends[list])}` : "";
    const page = await json(`/v1/${list}?limit=${PAGE}${after}`);
    ends[list] = page.last_id ?? page.data.at(-1)?.id;
    left[list] = Boolean(page.has_more);
    waiting.push(...page.data.map((entry) => ({ list, ...entry })));
  }
  waiting.sort((a, b) => b.created_at - a.created_at);
  const shown = waiting.splice(0, PAGE);
  for (const entry of shown) $("gallery").append(item(entry, open));
  $("more").hidden = !waiting.length && !left.images && !left.videos;
}

export function prepend(entry, open) {
  document.getElementById(`made-${entry.id}`)?.remove();
  $("gallery").prepend(item(entry, open));
}

function item(entry, open) {
  const element = document.createElement("li");
  element.id = `made-${entry.id}`;
  const button = document.createElement("button");
  button.type = "button";
  button.setAttribute("aria-label", `${entry.list === "videos" ? "video" : "image"}: ${entry.prompt}`);
  button.title = entry.prompt;
  button.addEventListener("click", () => open(entry));
  element.append(button);
  if (entry.status === "completed") {
    const picture = document.createElement("img");
    picture.alt = entry.prompt;
    button.append(picture);
    file(preview(entry)).then((url) => {
      picture.onload = () => URL.revokeObjectURL(url);
      picture.src = url;
    }).catch(() => { button.textContent = "gone"; });
  } else {
    button.textContent = entry.status.replace("_", " ");
  }
  if (entry.list === "videos") {
    const mark = document.createElement("span");
    mark.className = "mark";
    mark.textContent = "▶";
    button.append(mark);
  }
  return element;
}

const preview = (entry) => entry.list === "videos"
  ? `/v1/videos/${entry.id}/content?variant=thumbnail`
  : `/v1/images/${entry.id}/content`;

// The files of an entry, as paths of this server.
export const contents = (entry) => entry.list === "videos"
  ? Array.from({ length: entry.num_outputs || 1 }, (_, i) => `/v1/videos/${entry.id}/content?index=${i}`)
  : entry.data.map((_, i) => `/v1/images/${entry.id}/content?variant=${i}`);

export async function remove(entry) {
  await call(`/v1/${entry.list}/${entry.id}`, { method: "DELETE" });
  document.getElementById(`made-${entry.id}`)?.remove();
}
