// Calls of the server: with the key where there is one, and with its own words where it refuses.

let key = sessionStorage.getItem("key") || "";

export function useKey(value) {
  key = value.trim();
  sessionStorage.setItem("key", key);
}

export const locked = () => Boolean(key);

export class Refusal extends Error {
  constructor(status, message, param = null) {
    super(message);
    this.status = status;
    this.param = param; // the field to blame
  }
}

export async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.authorization = `Bearer ${key}`;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, "The server does not answer. Is it still running?");
  }
  if (answer.ok) return answer;
  let text = `The server answered ${answer.status}.`;
  let param = null;
  try {
    ({ message: text, param } = (await answer.json()).error);
  } catch { /* not one of its own answers */ }
  throw new Refusal(answer.status, text, param);
}

export const json = async (path, options) => (await call(path, options)).json();

export const post = (path, body, signal) => call(path, {
  method: "POST",
  signal,
  ...(body instanceof FormData
    ? { body }
    : { body: JSON.stringify(body), headers: { "content-type": "application/json" } }),
});

// An <img> cannot send a key: files come as objects of this page.
export const file = async (path, signal) =>
  URL.createObjectURL(await (await call(path, { signal })).blob());

// The events of a stream, one by one, as their parsed data. A comment that says where an image stands
// is an event of the type "note".
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        throw error.name === "AbortError" ? error : new Refusal(0, "The connection to the server broke off.");
      });
      if (done) return;
      text += value;
      const parts = text.split("\n\n");
      text = parts.pop();
      for (const part of parts) {
        if (part.startsWith(": {")) yield { type: "note", ...JSON.parse(part.slice(2)) };
        const lines = part.split("\n").filter((line) => line.startsWith("data: "));
        if (!lines.length) continue;
        const told = lines.map((line) => line.slice(6)).join("\n");
        if (told === "[DONE]") continue;
        const data = JSON.parse(told);
        if (data.error && !data.type) throw new Refusal(200, data.error.message);
        yield data;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
