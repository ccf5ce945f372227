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
  // The first size is the model's own; beside a picture the server takes that of the picture for it.
  const own = $("size").value === $("size").options[0].value;
  if (!(own && !$("edit").hidden))
    body.size = $("size").value === "other" ? $("size-text").value.trim() : $("size").value;
  if ($("steps").value) body.num_inference_steps = Number($("steps").value);
  if ($("guidance").value) body.guidance_scale = Number($("guidance").value);
  body.seed = Number($("seed").value || 0);
  if (kind() === "video") body.num_frames = Number($("frames").value);
  else if ($("count").value && Number($("count").value) !== 1) body.n = Number($("count").value);
  if (kind() === "edit" && !$("strength-part").hidden) body.strength = Number($("strength").value);
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
  if (body.strength !== undefined) {
    $("strength").value = body.strength;
    $("strength").dispatchEvent(new Event("input"));
  }
  for (const row of document.querySelectorAll(".adapter")) {
    const used = body.lora?.find((one) => one.nickname === row.dataset.nickname);
    row.querySelector("[type=checkbox]").checked = Boolean(used);
    if (used) row.querySelector("[type=number]").value = used.strength;
  }
}

const PATHS = { image: "/v1/images/generations", video: "/v1/videos", edit: "/v1/images/edits" };

export const path = (what) => PATHS[what];

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

// The files beside the fields: what was edited or begun with, and the mask. They are not copied; the
// pasted text wants them beside it.
function beside(what, picture, mask) {
  const name = what === "video" ? "input_reference" : "image";
  return [...(picture ? [[name, "picture.png"]] : []), ...(mask ? [["mask", "mask.png"]] : [])];
}

// In a form everything is text.
const flat = (value) => (typeof value === "object" ? JSON.stringify(value) : value);

const SAVE = `python3 -c 'import base64, json, sys
for i, one in enumerate(json.load(sys.stdin)["data"]):
    open(f"image-{i}.png", "wb").write(base64.b64decode(one["b64_json"]))'`;
const ID = `python3 -c 'import json, sys; print(json.load(sys.stdin)["id"])'`;

// `made` is what is shown; `locked`: the server wants a key, which is not copied.
export function asCurl({ what, body, picture, mask }, locked) {
  const url = location.origin + path(what);
  const key = locked ? [`-H "authorization: Bearer $API_KEY"`] : [];
  const files = beside(what, picture, mask);
  const sent = files.length || what === "edit"
    ? [...files.map(([name, file]) => `-F ${name}=@${file}`),
      ...Object.entries(body).map(([name, value]) => `-F ${quoted(`${name}=${flat(value)}`)}`)]
    : ["-H 'content-type: application/json'", `-d ${quoted(JSON.stringify(body))}`];
  const post = [`curl -s ${url}`, ...key, ...sent].join(" \\\n  ");
  if (what !== "video") return `${post} |\n${SAVE}`;
  const get = ["curl -s", ...key].join(" ");
  return [`id=$(${post} |\n${ID})`, `${get} ${url}/$id/events > events.txt`,
    `${get} ${url}/$id/content -o video.mp4`].join("\n");
}

function literal(value) {
  if (value === true || value === false) return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value);
  const entries = Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${literal(one)}`);
  return `{${entries.join(", ")}}`;
}

export function asPython({ what, body, picture, mask }, locked) {
  const { prompt, size, n, ...rest } = body;
  const files = beside(what, picture, mask);
  // The SDK sends everything but images from a prompt as forms.
  if (what !== "image") for (const name of Object.keys(rest)) rest[name] = flat(rest[name]);
  if (what === "video" && n !== undefined) rest.n = n; // no argument of the SDK
  const named = Object.entries({ prompt, size, ...(what === "video" ? {} : { n }) });
  const make = { image: "images.generate", video: "videos.create_and_poll", edit: "images.edit" }[what];
  const end = what === "video"
    ? ['client.videos.download_content(made.id).write_to_file("video.mp4")']
    : ["for i, image in enumerate(made.data):",
      '    open(f"image-{i}.png", "wb").write(base64.b64decode(image.b64_json))'];
  const modules = [...(what === "video" ? [] : ["base64"]), ...(locked ? ["os"] : [])];
  return [
    ...modules.map((name) => `import ${name}`), ...(modules.length ? [""] : []),
    "from openai import OpenAI", "",
    `client = OpenAI(base_url="${location.origin}/v1", api_key=${locked ? 'os.environ["API_KEY"]' : '"none"'})`,
    `made = client.${make}(`,
    `    model=${literal(document.body.dataset.model)},`,
    ...files.map(([name, file]) => `    ${name}=open("${file}", "rb"),`),
    ...named.filter(([, value]) => value !== undefined).map(([name, value]) => `    ${name}=${literal(value)},`),
    `    extra_body=${literal(rest)},`, ")", ...end,
  ].join("\n");
}
