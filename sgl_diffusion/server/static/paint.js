// The picture to edit, and the mask that is painted over it.

const $ = (id) => document.getElementById(id);

let picture = null; // the file
let strokes = null; // a canvas of the picture's own size, bright where it is painted
let able = true; // whether a part can be chosen

export const chosen = () => picture;

export async function choose(blob, name = "picture.png") {
  if (!blob) {
    picture = strokes = null;
    $("painting").hidden = true;
    $("drop").hidden = false;
    $("picture").value = "";
    return;
  }
  const image = await createImageBitmap(blob).catch(() => {
    throw new Error(`${name} is no picture that this browser can read.`);
  });
  picture = new File([blob], name, { type: blob.type || "image/png" });
  strokes = document.createElement("canvas");
  $("canvas").width = strokes.width = image.width;
  $("canvas").height = strokes.height = image.height;
  $("canvas").image = image;
  $("painting").hidden = false;
  $("drop").hidden = true;
  show();
}

export function allow(on) {
  able = on;
  for (const id of ["paint-hint", "unpaint"]) $(id).hidden = !on;
  if (strokes) show();
}

export const painted = () => able && strokes !== null
  && strokes.getContext("2d").getImageData(0, 0, strokes.width, strokes.height).data.some(Boolean);

// Black, and white where it is painted.
export function mask() {
  const whole = document.createElement("canvas");
  whole.width = strokes.width;
  whole.height = strokes.height;
  const pen = whole.getContext("2d");
  pen.fillRect(0, 0, whole.width, whole.height);
  pen.drawImage(strokes, 0, 0);
  return new Promise((done) => { whole.toBlob(done, "image/png"); });
}

function show() {
  const pen = $("canvas").getContext("2d");
  pen.globalAlpha = 1;
  pen.drawImage($("canvas").image, 0, 0);
  pen.globalAlpha = 0.6;
  if (able) pen.drawImage(strokes, 0, 0);
}

function at(event) {
  const box = $("canvas").getBoundingClientRect();
  const scale = strokes.width / box.width;
  return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale, 14 * scale];
}

function stroke(from, to, width) {
  const pen = strokes.getContext("2d");
  pen.strokeStyle = "#fff";
  pen.lineCap = "round";
  pen.lineWidth = width;
  pen.beginPath();
  pen.moveTo(...from);
  pen.lineTo(...to);
  pen.stroke();
  show();
}

// `failed` is told what a person has to know.
export function install(failed) {
  const take = (file) => choose(file, file?.name).then(() => failed(""), (error) => failed(error.message));
  let last = null;
  $("canvas").addEventListener("pointerdown", (event) => {
    if (!able) return;
    const [x, y, width] = at(event);
    $("canvas").setPointerCapture(event.pointerId);
    stroke([x, y], [x, y], width);
    last = [x, y];
  });
  $("canvas").addEventListener("pointermove", (event) => {
    if (!last) return;
    const [x, y, width] = at(event);
    stroke(last, [x, y], width);
    last = [x, y];
  });
  for (const end of ["pointerup", "pointercancel"])
    $("canvas").addEventListener(end, () => { last = null; });
  $("unpaint").addEventListener("click", () => {
    strokes.getContext("2d").clearRect(0, 0, strokes.width, strokes.height);
    show();
  });
  $("unpick").addEventListener("click", () => choose(null));
  $("picture").addEventListener("change", (event) => take(event.target.files[0]));
  const drop = $("drop");
  drop.addEventListener("dragover", (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    take(event.dataTransfer.files[0]);
  });
}
