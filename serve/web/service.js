// Calls of the service: JSON, and server-sent events over POST; every failure becomes a Problem.

const KEY = "invar-key";
let memory = ""; // where a browser keeps no session storage

export const key = {
  get() {
    try { return sessionStorage.getItem(KEY) ?? memory; } catch { return memory; }
  },
  set(value) {
    memory = value;
    try { value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY); } catch { /* memory has it */ }
  },
};

export class Problem extends Error {
  // status 0: no answer at all; "cut" is an answer that broke off.
  constructor(status, code, message, requestId = "", retryAfter = 0) {
    super(message);
    Object.assign(this, { status, code, requestId, retryAfter });
  }

  static of(body, status, retryAfter) {
    const error = body?.error ?? {};
    return new Problem(status, error.code ?? "", error.message ?? `The service answered with HTTP ${status}.`, error.request_id, retryAfter);
  }
}

async function send(path, body, signal) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  if (key.get()) headers["X-API-Key"] = key.get();
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal, credentials: "same-origin" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, "unreachable", "There was no answer. Is the service running, and is this machine connected?");
  }
  if (!response.ok) {
    const retryAfter = Number(response.headers.get("Retry-After")) || 0;
    throw Problem.of(await response.json().catch(() => null), response.status, retryAfter);
  }
  return response;
}

export async function call(path, body, signal) {
  return (await send(path, body, signal)).json();
}

// Yields {name, data} until the event `done`; throws if the stream ends before it, or says that it failed.
export async function* events(path, body, signal) {
  const response = await send(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      buffer += value;
      const blocks = buffer.split(/\r?\n\r?\n/);
      buffer = blocks.pop();
      for (const event of blocks.map(parse)) {
        if (event.name === "done") return;
        if (event.name === "error") throw Problem.of(event.data, "cut", 0);
        yield event;
      }
    }
  } catch (error) {
    if (error instanceof Problem || error.name === "AbortError") throw error;
    throw new Problem("cut", "cut", "The connection was lost before the answer was complete.");
  } finally {
    reader.cancel().catch(() => {});
  }
  throw new Problem("cut", "cut", "The answer ended before it was complete.");
}

export function parse(block) {
  const event = { name: "message", data: "" };
  for (const line of block.split(/\r?\n/)) {
    if (line.startsWith("event:")) event.name = line.slice(6).trim();
    else if (line.startsWith("data:")) event.data += line.slice(5).replace(/^ /, "");
  }
  event.data = event.data ? JSON.parse(event.data) : {};
  return event;
}
