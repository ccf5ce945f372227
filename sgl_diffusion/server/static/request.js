// From the form to a request, and from a request to what one pastes into a terminal or a program.

const $ = (id) => document.getElementById(id);

export const kind = () => document.querySelector("input[name=kind]:checked").value;

export function fill(info) {
  const { defaults } = info;
  const unit = info.size_multiple || 16;
  const fit = (edge) => Math.min(Math.max(unit, Math.round(edge / unit) * unit), info.max_edge || 8192);
  const own = [defaults.width || 512, defaults.height || 512];
  const area = Math.sqrt(own[0] * own[1]);
  const shapes = [[1, 1], [4, 3], [3, 4], [16, 9], [9, 16]];
  const sizes = [own, ...shapes.map(([w, h]) => [area * Math.sqrt(w / h), area * Math.sqrt(h / w)]),
    [area / 2, area / 2]];
  const texts = [...new Set(sizes.map(([w, h]) => `${fit(w)}x${fit(h)}`))];
  $("size").replaceChildren(...texts.map(option), option("other …", "other"));
  const step = info.frame_multiple || 1;
  const most = defaults.num_frames > 1 ? defaults.num_frames : 17;
  const counts = new Set();
  for (let frames = 1 + step; frames < most; frames += Math.max(step, Math.ceil(most / 6 / step) * step))
    counts.add(frames);
  counts.add(most);
  $("frames").replaceChildren(...[...counts].map((n) => option(String(n))));
  $("frames").value = String(most);
  $("steps").value = defaults.num_inference_steps ?? "";
  $("guidance").value = defaults.guidance_scale ?? "";
}

function option(text, value = text) {
  const made = document.createElement("option");
  made.textContent = text;
  made.value = typeof value === "string" ? value : text;
  return made;
}

export function read() {
  const body = { prompt: $("prompt").value };
  if ($("negative").value.trim()) body.negative_prompt = $("negative").value;
  const size = $("size").value === "other" ? $("size-text").value.trim() : $("size").value;
  if (size && !(kind() === "edit" && $("size").value === $("size").options[0].value)) body.size = size;
  if ($("steps").value) body.num_inference_steps = Number($("steps").value);
  if ($("guidance").value) body.guidance_scale = Number($("guidance").value);
  body.seed = Number($("seed").value || 0);
  if (kind() === "video") body.num_frames = Number($("frames").value);
  else if (Number($("count").value) > 1) body.n = Number($("count").value);
  const loras = [...document.querySelectorAll(".adapter")]
    .filter((row) => row.querySelector("[type=checkbox]").checked)
    .map((row) => ({
      nickname: row.dataset.nickname,
      strength: Number(row.querySelector("[type=number]").value),
    }));
  if (loras.length) body.lora = loras;
  return body;
}

// The form as it was for a request. Of one that is not known as a whole, what is known.
export function write(body, whole) {
  $("prompt").value = body.prompt || "";
  if (whole) writeRest(body);
  if (body.num_frames > 1) {
    const frames = String(body.num_frames);
    if (![...$("frames").options].some((one) => one.value === frames)) $("frames").add(option(frames));
    $("frames").value = frames;
  }
  if (body.size) {
    const known = [...$("size").options].some((one) => one.value === body.size);
    $("size").value = known ? body.size : "other";
    $("size-text").value = known ? "" : body.size;
    $("size").dispatchEvent(new Event("change"));
  }
  if (body.seed !== undefined) {
    $("seed").value = body.seed;
    $("lock").checked = true;
  }
}

function writeRest(body) {
  $("negative").value = body.negative_prompt || "";
  $("negative").parentElement.open = Boolean(body.negative_prompt);
  $("steps").value = body.num_inference_steps ?? "";
  $("guidance").value = body.guidance_scale ?? "";
  $("count").value = body.n ?? 1;
  for (const row of document.querySelectorAll(".adapter")) {
    const used = body.lora?.find((one) => one.nickname === row.dataset.nickname);
    row.querySelector("[type=checkbox]").checked = Boolean(used);
    if (used) row.querySelector("[type=number]").value = used.strength;
  }
}

const PATHS = { image: "/v1/images/generations", video: "/v1/videos", edit: "/v1/images/edits" };

export const path = (what) => PATHS[what];

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

// `locked`: the server wants a key, which is not copied.
export function asCurl(what, body, locked) {
  const url = location.origin + path(what);
  const key = locked ? ['-H "authorization: Bearer $API_KEY"'] : [];
  if (what !== "edit") {
    const sent = ["-H 'content-type: application/json'", `-d ${quoted(JSON.stringify(body))}`];
    return [`curl ${url}`, ...key, ...sent].join(" \\\n  ");
  }
  const fields = Object.entries(body).map(([name, value]) =>
    `-F ${quoted(`${name}=${typeof value === "object" ? JSON.stringify(value) : value}`)}`);
  return [`curl ${url}`, ...key, "-F image=@picture.png", ...fields].join(" \\\n  ");
}

export function asPython(what, body, locked) {
  const { prompt, size, seconds, n, ...rest } = body;
  const named = Object.entries({ prompt, size, n }).filter(([, value]) => value !== undefined);
  const lines = named.map(([name, value]) => `    ${name}=${JSON.stringify(value)},`);
  const extra = JSON.stringify(rest).replaceAll(":true", ":True").replaceAll(":false", ":False");
  const make = { image: "images.generate", video: "videos.create", edit: "images.edit" }[what];
  const end = what === "video"
    ? `video = client.videos.poll(made.id)\nclient.videos.download_content(video.id).write_to_file("video.mp4")`
    : `open("image.png", "wb").write(base64.b64decode(made.data[0].b64_json))`;
  return [
    ...(what === "video" ? [] : ["import base64"]),
    ...(locked ? ["import os"] : []),
    ...(what === "video" && !locked ? [] : [""]),
    "from openai import OpenAI", "",
    `client = OpenAI(base_url="${location.origin}/v1", api_key=${locked ? 'os.environ["API_KEY"]' : '"none"'})`,
    `made = client.${make}(`,
    `    model="${document.body.dataset.model}",`,
    ...(what === "edit" ? ['    image=open("picture.png", "rb"),'] : []),
    ...lines,
    `    extra_body=${extra},`, ")", end,
  ].join("\n");
}
