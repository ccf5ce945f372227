// The chat: what is said, what is answered in text and sound, and how.

import { events, json, post, useKey } from "./api.js";
import { Player, wav } from "./sound.js";

const $ = (id) => document.getElementById(id);
const KINDS = { image: "image_url", audio: "audio_url", video: "video_url" };
let said = []; // the messages so far, as the server takes them
let pieces = []; // { kind, name, url } attached to the next one
let running = null; // { controller, player }
let takes = []; // what the model takes, beside text

async function connect() {
  try {
    const { data: [model] } = await json("/v1/models");
    $("model").textContent = model.id;
    document.body.dataset.model = model.id;
    takes = model.input_modalities.filter((kind) => kind !== "text");
    $("attach").hidden = !takes.length;
    $("file").accept = takes.map((kind) => `${kind}/*`).join(",");
    $("speaks").hidden = $("voices").hidden = !model.voices.length;
    $("voice").replaceChildren(...model.voices.map((name) => new Option(name)));
    problem("");
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

function problem(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

function number(id) {
  const value = $(id).value.trim();
  return value === "" ? undefined : Number(value);
}

function body(messages) {
  const system = $("system").value.trim();
  const wish = {
    model: document.body.dataset.model,
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    stream: true,
    temperature: number("temperature"),
    max_tokens: number("tokens"),
    seed: number("seed"),
  };
  if (!$("speaks").hidden && $("speak").checked) {
    wish.modalities = ["text", "audio"];
    wish.audio = { voice: $("voice").value, format: "pcm16" };
  }
  return wish;
}

// -- what stands in the list ------------------------------------------------------------------------

function line(role) {
  $("empty")?.remove();
  const item = document.createElement("li");
  item.className = role;
  const text = document.createElement("div");
  text.className = "said";
  item.append(text);
  $("talk").append(item);
  $("clear").disabled = false;
  return { item, text };
}

function under(item, words) {
  const note = document.createElement("p");
  note.className = "under";
  note.textContent = words;
  item.append(note);
}

// Whoever has scrolled up to read stays there.
function follow() {
  const list = $("talk");
  if (list.scrollHeight - list.scrollTop - list.clientHeight < 120) toEnd();
}

function toEnd() {
  $("talk").scrollTop = $("talk").scrollHeight;
}

function media(item, kind, url) {
  const element = document.createElement(kind === "image" ? "img" : kind);
  element.src = url;
  if (kind === "image") {
    element.alt = "attached picture";
    element.onload = toEnd; // only now it has its height
  } else {
    element.controls = true;
  }
  item.append(element);
}

// -- one answer -------------------------------------------------------------------------------------

async function send() {
  const text = $("prompt").value.trim();
  if (running || (!text && !pieces.length)) return;
  const mine = line("user");
  mine.text.textContent = text;
  for (const piece of pieces) media(mine.item, piece.kind, piece.url);
  const parts = pieces.map(({ kind, url }) => ({ type: KINDS[kind], [KINDS[kind]]: { url } }));
  if (text) parts.push({ type: "text", text });
  const message = { role: "user", content: parts.length === 1 && text ? text : parts };
  $("prompt").value = "";
  attach([]);
  if (await answer([...said, message])) return;
  mine.item.remove(); // it was refused: it can be said in another way
  $("prompt").value = text;
}

// Whether something came back; then it is a part of the chat, whole or not.
async function answer(messages) {
  const controller = new AbortController();
  const wish = body(messages);
  const player = wish.modalities ? new Player() : null;
  running = { controller, player };
  busy(true);
  problem("");
  const mine = line("assistant");
  mine.item.classList.add("writing");
  toEnd();
  const began = performance.now();
  let first = 0;
  let usage = null;
  let ended = "";
  try {
    for await (const chunk of events(await post("/v1/chat/completions", wish, controller.signal))) {
      if (chunk.usage) usage = chunk.usage;
      const choice = chunk.choices[0];
      if (!choice) continue;
      ended = choice.finish_reason || ended;
      const { content, audio } = choice.delta;
      if (content || audio?.data) first ||= performance.now() - began;
      if (content) mine.text.textContent += content;
      if (audio?.data) player?.add(audio.data);
      follow();
    }
  } catch (error) {
    if (error.name === "AbortError") ended = "stopped";
    else problem(error.message);
  }
  mine.item.classList.remove("writing");
  running = null;
  busy(false);
  const words = mine.text.textContent;
  if (!words && !player?.length) {
    mine.item.remove();
    if (ended) problem(ended === "stopped" ? "" : "The model said nothing.");
    return ended === "stop";
  }
  if (player?.length) media(mine.item, "audio", URL.createObjectURL(wav(player.samples())));
  under(mine.item, told(usage, first, performance.now() - began, ended));
  said = [...messages, { role: "assistant", content: words }];
  follow();
  return true;
}

function told(usage, first, whole, ended) {
  const notes = [`first after ${(first / 1000).toFixed(2)} s`];
  if (usage) {
    const tokens = usage.completion_tokens_details.text_tokens;
    notes.push(`${tokens} tokens in ${(whole / 1000).toFixed(1)} s`);
  }
  if (ended === "length") notes.push("cut at the most tokens");
  if (ended === "stopped") notes.push("stopped");
  return notes.join(" · ");
}

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
  $("state").textContent = is ? "answering …" : "";
  document.body.dataset.busy = is;
}

// -- attachments ------------------------------------------------------------------------------------

function attach(next) {
  pieces = next;
  $("pieces").hidden = !pieces.length;
  $("pieces").replaceChildren(...pieces.map((piece) => {
    const item = document.createElement("li");
    const button = document.createElement("button");
    Object.assign(button, { type: "button", className: "quiet", textContent: `${piece.name} ✕` });
    button.setAttribute("aria-label", `Remove ${piece.name}`);
    button.onclick = () => attach(pieces.filter((one) => one !== piece));
    item.append(button);
    return item;
  }));
}

const read = (file) => new Promise((done, failed) => {
  const reader = new FileReader();
  reader.onload = () => done(reader.result);
  reader.onerror = () => failed(reader.error);
  reader.readAsDataURL(file);
});

async function take(files) {
  problem("");
  for (const file of files) {
    const kind = file.type.split("/")[0];
    if (!takes.includes(kind)) {
      problem(`${file.name} is nothing that this model takes.`);
      continue;
    }
    attach([...pieces, { kind, name: file.name, url: await read(file) }]);
  }
}

// -- the page ---------------------------------------------------------------------------------------

$("form").onsubmit = (event) => {
  event.preventDefault();
  send();
};
$("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
};
$("stop").onclick = () => {
  running?.player?.stop();
  running?.controller.abort();
};
$("clear").onclick = () => {
  $("stop").onclick();
  said = [];
  attach([]);
  $("talk").replaceChildren();
  $("clear").disabled = true;
  problem("");
  $("prompt").focus();
};
$("file").onchange = async () => {
  await take($("file").files);
  $("file").value = "";
};
$("form").ondragover = (event) => event.preventDefault();
$("form").ondrop = (event) => {
  event.preventDefault();
  take(event.dataTransfer.files);
};
$("key").onchange = () => {
  useKey($("key").value);
  connect();
};
$("theme").onclick = () => {
  const root = document.documentElement;
  const dark = root.dataset.theme
    ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("theme", root.dataset.theme);
};

const theme = localStorage.getItem("theme");
if (theme) document.documentElement.dataset.theme = theme;
$("key").value = sessionStorage.getItem("key") || "";
connect();
