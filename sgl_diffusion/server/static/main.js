// The page: reads the form, follows the work, shows what came of it.

import { call, events, file, json, locked, post, Refusal, useKey } from "./api.js";
import * as gallery from "./gallery.js";
import * as paint from "./paint.js";
import * as request from "./request.js";

const $ = (id) => document.getElementById(id);
const NARROW = matchMedia("(max-width: 760px)");
const STILL = matchMedia("(prefers-reduced-motion: reduce)");
let running = null; // { controller, video }
let model = null; // what the server says of its model
let shown = null; // what was made and is shown last: { entry, what, body, whole, urls, picture, mask }
const FIELDS = { // of the parameters that a server may blame
  prompt: "prompt", negative_prompt: "negative", size: "size", width: "size", height: "size",
  num_inference_steps: "steps", guidance_scale: "guidance", seed: "seed", n: "count",
  num_frames: "frames", image: "picture", input_reference: "picture", strength: "strength",
};

async function start() {
  const theme = localStorage.getItem("theme");
  if (theme) document.documentElement.dataset.theme = theme;
  $("key").value = sessionStorage.getItem("key") || "";
  paint.install(problem);
  await connect();
}

async function connect() {
  try {
    const [info, models] = await Promise.all([json("/model_info"), json("/v1/models")]);
    document.body.dataset.model = $("model").textContent = models.data[0].id;
    model = info;
    $("note").textContent = info.note && `This is ${info.note}.`;
    $("note").hidden = !info.note;
    request.fill(info);
    for (const [name, can] of [
      ["image", info.is_image_gen && !info.min_images], ["video", info.output_types.includes("video")],
      ["edit", info.is_image_gen && info.max_images > 0]]) {
      const choice = document.querySelector(`input[value=${name}]`);
      choice.disabled = !can;
      if (!can && choice.checked) document.querySelector("input[name=kind]:not(:disabled)").checked = true;
    }
    switchKind();
    problem("");
    await Promise.all([adapters(), gallery.load(open)]);
    await resume();
  } catch (error) {
    if (error.status === 401) {
      $("key-part").open = true;
      $("model").textContent = "an API key is needed";
      $("key").focus();
    } else if (error.status === 503) {
      $("model").textContent = error.message;
      setTimeout(connect, 1000); // it loads
      return;
    }
    problem(error.message);
  }
}

async function adapters() {
  const { loaded_adapters: known } = await json("/v1/list_loras");
  const usable = known.filter((one) => one.per_request !== false);
  $("adapters").hidden = !usable.length;
  $("adapter-list").replaceChildren(...usable.map((one) => {
    const row = document.createElement("div");
    row.className = "adapter";
    row.dataset.nickname = one.nickname;
    const label = document.createElement("label");
    const box = document.createElement("input");
    box.type = "checkbox";
    label.append(box, one.nickname);
    const strength = document.createElement("input");
    Object.assign(strength, { type: "number", value: "1", step: "0.1", min: "-2", max: "2" });
    strength.setAttribute("aria-label", `Strength of ${one.nickname}`);
    row.append(label, strength);
    return row;
  }));
}

// A video that was being made when the page was left is followed again.
async function resume() {
  const { data } = await json("/v1/videos?limit=10");
  const open = data.find((video) => ["queued", "in_progress"].includes(video.status));
  if (open && !running) await work((signal) => follow(open, signal), open.id);
}

// Some models make a video from its first picture; some can do nothing else.
const begins = () => request.kind() === "video" && Boolean(model?.supported_task_types.includes("I2V"));

function switchKind() {
  const kind = request.kind();
  $("edit").hidden = kind !== "edit" && !begins();
  $("drop-text").textContent = kind === "video"
    ? "Drop the first picture of the video here, or choose one" : "Drop a picture here, or choose one";
  $("strength-part").hidden = kind !== "edit" || model?.edits !== "image-to-image";
  paint.allow(kind === "edit" && Boolean(model?.masks));
  for (const one of document.querySelectorAll(".video-only")) one.hidden = kind !== "video";
  for (const one of document.querySelectorAll(".image-only")) one.hidden = kind === "video";
}

async function submit(event) {
  event.preventDefault();
  if (running) return;
  if (!model) return problem("Nothing can be made yet: the server has not told its model.");
  if (!$("lock").checked) $("seed").value = String(Math.floor(Math.random() * 2 ** 31));
  const what = request.kind();
  const body = request.read();
  if ((what === "edit" || (begins() && model.min_images)) && !paint.chosen())
    return problem(`Choose a picture to ${what === "edit" ? "edit" : "begin with"} first.`, "image");
  await work((signal) => (what === "video" ? video(body, signal) : image(what, body, signal)));
}

async function work(job, video = null) {
  const controller = new AbortController();
  running = { controller, video };
  busy(true);
  problem("");
  state("Waiting …");
  try {
    await job(controller.signal);
  } catch (error) {
    if (error.name === "AbortError") state("Cancelled.");
    else {
      state("");
      problem(error.message, error.param);
    }
  } finally {
    running = null;
    busy(false);
    restore();
  }
}

const left = (seconds) => (seconds ? `, about ${Math.ceil(seconds)} s left` : "");

const waiting = (now) => state(`Waiting, ${now.queue_position ?? 0} before it${left(now.eta_s)}`);

const previews = () => (model?.previews ? { partial_images: 3 } : {});

function formOf(fields, files) {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields))
    form.append(name, typeof value === "object" ? JSON.stringify(value) : value);
  for (const [name, blob] of Object.entries(files)) if (blob) form.append(name, blob, `${name}.png`);
  return form;
}

async function image(what, body, signal) {
  const sent = { ...body, ...previews(), stream: true };
  const files = { picture: what === "edit", mask: what === "edit" && paint.painted() };
  const form = what !== "edit" ? sent
    : formOf(sent, { image: paint.chosen(), mask: files.mask && await paint.mask() });
  const began = performance.now();
  const answer = await post(request.path(what), form, signal);
  state("Making it …");
  const urls = [];
  let id = "";
  for await (const data of events(answer)) {
    if (data.type === "note") {
      if (data.queue_position !== undefined) waiting(data);
      else {
        $("progress").value = (100 * data.step) / (data.steps || 1);
        state(`${data.steps ? `Step ${data.step} of ${data.steps}` : "Making it"}${left(data.eta_s)}`);
      }
      continue;
    }
    const url = `data:image/${data.output_format || "png"};base64,${data.b64_json}`;
    if (data.type.endsWith("partial_image")) {
      view([...urls, url], "image", true);
    } else if (data.type.endsWith("completed")) {
      urls.push(url);
      id = data.id;
    }
  }
  if (!id) throw new Refusal(0, "The server ended before the picture was done.");
  const seconds = ((performance.now() - began) / 1000).toFixed(1);
  const entry = { list: "images", ...(await json(`/v1/images/${id}`)) };
  present(entry, what, body, true, urls, files);
  state(`Done in ${seconds} s, seed ${body.seed}.`);
  gallery.prepend(entry, open);
}

async function video(body, signal) {
  const sent = { ...body, ...previews() };
  const picture = begins() && paint.chosen();
  const form = picture ? formOf(sent, { input_reference: picture }) : sent;
  const made = await (await post("/v1/videos", form, signal)).json();
  running.video = made.id;
  await follow(made, signal, body, Boolean(picture));
}

async function follow(made, signal, body = null, picture = false) {
  let preview = "";
  for await (const { type, video: now } of events(await call(`/v1/videos/${made.id}/events`, { signal }))) {
    if (type === "video.queued") waiting(now);
    else if (type === "video.in_progress") {
      $("progress").value = now.progress;
      state(`${now.progress} %${left(now.eta_s)}`);
      if (now.preview_url && now.preview_url + now.progress !== preview) {
        preview = now.preview_url + now.progress;
        file(`/v1/videos/${made.id}/preview`, signal).then((url) => running?.video === made.id && view([url], "image", true)).catch(() => {});
      }
    } else if (type === "video.failed") throw new Refusal(200, now.error?.message || "It failed.");
    else if (type === "video.completed") {
      const entry = { list: "videos", ...now };
      await open(entry, body, { picture });
      state(`Done in ${now.inference_time_s} s, seed ${now.seed}.`);
      gallery.prepend(entry, open);
    }
  }
}

async function open(entry, body = null, files = {}) {
  if (entry.status !== "completed") return problem(entry.error?.message || `It is ${entry.status}.`);
  const urls = await Promise.all(gallery.contents(entry).map((path) => file(path)));
  const what = entry.list === "videos" ? "video" : "image";
  const settings = body || { prompt: entry.prompt, size: entry.size, seed: entry.seed ?? entry.seeds?.[0],
    ...(what === "video" ? { num_frames: entry.num_frames } : {}) };
  present(entry, what, settings, body !== null, urls, files);
  state(entry.prompt);
}

// `whole`: the body is all that was asked for, and not only what the server tells of it later; of the
// `files` beside it we know whether there was a picture and a mask.
function present(entry, what, body, whole, urls, files) {
  shown = { entry, what, body, whole, urls, ...files };
  view(urls, what === "video" ? "video" : "image", false, body.prompt);
  $("as-input").hidden = what === "video" || document.querySelector("input[value=edit]").disabled;
  $("download").href = urls[0];
  $("download").download = `${entry.id}.${what === "video" ? "mp4" : entry.output_format || "png"}`;
}

// A preview of what did not get done gives way to what was there before: the tools are for that.
function restore() {
  if (!document.querySelector("#view .coming")) return;
  if (shown) view(shown.urls, shown.what === "video" ? "video" : "image", false, shown.body.prompt);
  else $("view").replaceChildren();
}

function view(urls, tag, coming, text = "") {
  $("tools").hidden = coming;
  $("view").replaceChildren(...urls.map((url) => {
    const element = document.createElement(tag === "video" ? "video" : "img");
    if (tag === "video") Object.assign(element, { controls: true, loop: true, muted: true, autoplay: !STILL.matches });
    else element.alt = coming ? "preview" : text;
    element.className = coming ? "coming" : "";
    element.src = url;
    return element;
  }));
}

// The focus stays on the button that there is: hidden or disabled it would go to the top of the page.
function busy(on) {
  const focused = document.activeElement === $(on ? "go" : "cancel");
  $("go").disabled = on;
  $("cancel").hidden = !on;
  $("progress").hidden = !on;
  if (focused) $(on ? "cancel" : "go").focus();
  if (on) $("progress").value = 0;
  if (on && NARROW.matches) $("go").scrollIntoView({ behavior: STILL.matches ? "auto" : "smooth" });
}

async function cancel() {
  if (!running) return;
  const { controller, video } = running;
  controller.abort();
  if (video) await call(`/v1/videos/${video}`, { method: "DELETE" }).catch((error) => problem(error.message));
  document.getElementById(`made-${video}`)?.remove();
}

// `param` is what the server blames: its field is marked, and ready to be typed into.
function problem(text, param = null) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
  document.querySelector("[aria-invalid]")?.removeAttribute("aria-invalid");
  const name = param === "size" && $("size").value === "other" ? "size-text" : FIELDS[param];
  if (!name) return;
  $(name).setAttribute("aria-invalid", "true");
  $(name).focus();
}

function state(text) {
  $("state").textContent = text;
}

// Browsers give pages a clipboard on https and on the own machine only.
async function copy(text, button) {
  if (navigator.clipboard) await navigator.clipboard.writeText(text);
  else {
    const field = document.createElement("textarea");
    field.value = text;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
    button.focus();
  }
  const before = (button.dataset.text ||= button.textContent);
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = before; }, 1200);
}

$("form").addEventListener("submit", submit);
$("cancel").addEventListener("click", cancel);
$("more").addEventListener("click", () => gallery.more(open));
for (const one of document.querySelectorAll("input[name=kind]")) one.addEventListener("change", switchKind);
$("size").addEventListener("change", () => { $("other-size").hidden = $("size").value !== "other"; });
$("strength").addEventListener("input", () => {
  $("strength-out").textContent = Number($("strength").value).toFixed(2);
});
$("key").addEventListener("change", () => {
  useKey($("key").value);
  connect();
});
$("key").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault(); // it is no wish for a picture
  $("key").blur();
});
$("theme").addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme
    ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("theme", document.documentElement.dataset.theme);
});
$("again").addEventListener("click", () => {
  if (shown.what !== "edit") document.querySelector(`input[value=${shown.what}]`).click();
  request.write(shown.body, shown.whole);
  $("prompt").focus();
});
$("as-input").addEventListener("click", async () => {
  await paint.choose(await (await fetch(shown.urls[0])).blob(), `${shown.entry.id}.png`);
  document.querySelector("input[value=edit]").click();
});
$("copy-curl").addEventListener("click", (event) =>
  copy(request.asCurl(shown, locked()), event.target));
$("copy-python").addEventListener("click", (event) =>
  copy(request.asPython(shown, locked()), event.target));
$("delete").addEventListener("click", async () => {
  if (!confirm("Delete it from the server?")) return;
  try {
    await gallery.remove(shown.entry);
    shown = null;
    view([], "image", true);
    state("Deleted.");
  } catch (error) {
    problem(error.message);
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
  if (event.key === "Escape") cancel();
});

start();
