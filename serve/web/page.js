// The page at `/`: what happens when. Rendering is in answer.js and stability.js, calls are in service.js.

import { asPlainText, light, scoreOf, showAnswer, showPassages, showText, unlight } from "./answer.js";
import { Problem, call, events, key } from "./service.js";
import { stabilityView } from "./stability.js";
import { $, make, plural, sentence } from "./text.js";

const TITLES = {
  0: "The service cannot be reached",
  400: "This cannot be asked",
  401: "A key is needed",
  403: "This key may not ask",
  408: "The question arrived too slowly",
  413: "This question is too long",
  422: "This cannot be asked",
  429: "Too many questions with this key",
  500: "The service failed",
  503: "The service is busy",
  504: "The answer took too long",
  cut: "The answer broke off",
};
let running = null; // AbortController of the question that is being answered
let comparing = null; // the same for the stability panel
let asked = null; // the request that the answer on the page belongs to
let answered = null; // the answer on the page
let seed = 0;
let again = null; // what "Try again" does

// The second part is for screen readers: the answer itself is no live region, it would be read piece by piece.
function say(text, aloud = "") { $("status").replaceChildren(text, make("span", { class: "unseen" }, aloud)); }

function busy(is) {
  $("send").textContent = is ? "Stop" : "Ask";
  $("send").classList.toggle("stop", is);
  $("answer-part").setAttribute("aria-busy", String(is));
  document.body.classList.toggle("busy", is);
}

function number(id) {
  const value = $(id).valueAsNumber;
  return Number.isFinite(value) ? value : undefined;
}

// Problems

let countdown = 0;

function hideProblem() {
  clearInterval(countdown);
  $("problem").hidden = true;
}

function showProblem(problem, retry) {
  hideProblem();
  const title = problem.status === 401 && key.get() ? "This key was not accepted" : TITLES[problem.status] ?? (problem.status >= 500 ? TITLES[500] : TITLES[400]);
  $("problem-title").textContent = problem.status === 503 && problem.code === "unavailable" ? "The service is not available" : title;
  $("problem-text").textContent = sentence(problem.message);
  $("problem-id").textContent = problem.requestId ? `Request ${problem.requestId}` : "";
  again = retry;
  $("retry").hidden = problem.status === 400 || problem.status === 422 || problem.status === 413;
  let left = Math.ceil(problem.retryAfter);
  const tick = () => {
    $("retry").disabled = left > 0;
    $("retry").textContent = left > 0 ? `Try again in ${left} s` : "Try again";
    if (left-- <= 0) clearInterval(countdown);
  };
  tick();
  if (left >= 0) countdown = setInterval(tick, 1000);
  $("problem").hidden = false;
  if (problem.status === 401) askForKey(retry, problem);
}

$("retry").addEventListener("click", () => again?.());

// Asking

async function ask() {
  const question = $("question").value.trim();
  if (!question) return $("question").focus();
  running?.abort();
  comparing?.abort();
  remember(question);
  const mine = (running = new AbortController());
  asked = { question, top_k: number("top-k"), max_new_tokens: number("length") };
  hideProblem();
  busy(true);
  say("Searching …");
  document.body.classList.remove("fresh");
  $("result").hidden = true;
  $("stability").hidden = true;
  $("measures").hidden = true;
  $("notes").replaceChildren();
  let found = [], written = "", reply = null;
  try {
    for await (const { name, data } of events("v1/answer", { ...asked, stream: true }, mine.signal)) {
      if (name === "passages") {
        found = data.passages;
        showPassages(found, scoreOf(data));
        showText("");
        $("result").hidden = false;
        say(`${plural(found.length, "passage")} found, the answer is being written …`);
      } else if (name === "delta") {
        written += data.text;
        showText(written);
      } else if (name === "answer") {
        reply = data;
        showAnswer(reply, found, written);
      }
    }
    if (!reply) throw new Problem("cut", "cut", "The service sent no complete answer.");
    finish(reply);
  } catch (error) {
    if (running !== mine) return; // another question has taken over
    if (error.name === "AbortError") stopped(written);
    else {
      if (!(error instanceof Problem)) console.error(error);
      say("");
      $("answer").classList.remove("writing");
      if (!found.length) $("result").hidden = true;
      showProblem(error instanceof Problem ? error : new Problem("cut", "page", "This page could not show the answer."), ask);
    }
  } finally {
    if (running === mine) {
      running = null;
      busy(false);
    }
  }
}

function stopped(written) {
  say("Stopped.");
  $("answer").classList.remove("writing");
  if (written) $("answer").append(" …");
}

function finish(reply) {
  answered = reply;
  $("copied").textContent = "";
  if (reply.low_confidence) say("The model is not sure enough to answer from these passages.");
  else if (reply.refused) say("The passages do not answer this question, says the model.");
  else if (!reply.answer) say("Passages were found, but no answer was written.");
  else say(`Answered, with ${plural(reply.citations.length, "citation")}.`, ` ${reply.answer}`);
  if (reply.citations.length) light(reply.citations[0].passage_id, false);
  seed = 0;
  $("stability-result").replaceChildren();
  $("stability-status").textContent = "";
  $("others").hidden = true;
  $("reword").disabled = $("others").disabled = false;
  $("stability").hidden = false;
}

$("form").addEventListener("submit", event => {
  event.preventDefault();
  if (running) running.abort();
  else ask();
});
$("question").addEventListener("keydown", event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
document.addEventListener("keydown", event => {
  if (event.key !== "Escape" || $("key-dialog").open) return;
  if (!unlight()) running?.abort();
});

// The question's field grows with its text.
function grow() {
  $("question").style.height = "auto";
  $("question").style.height = `${$("question").scrollHeight}px`;
}
$("question").addEventListener("input", grow);
addEventListener("resize", grow);

// In other words

async function compare() {
  comparing?.abort();
  const mine = (comparing = new AbortController());
  const wanted = number("rewrites") ?? 3;
  $("reword").disabled = $("others").disabled = true;
  $("stability-status").textContent = `Asking in ${plural(wanted + 1, "wording")} …`;
  $("stability-result").classList.add("stale");
  hideProblem();
  try {
    const result = await call("v1/stability", { ...asked, rewrites: wanted, seed }, mine.signal);
    $("stability-result").replaceChildren(...stabilityView(result, askThis));
    $("stability-status").textContent = `Compared ${plural(result.wordings.length, "wording")}.`;
    $("others").hidden = result.wordings.length < 2;
  } catch (error) {
    if (comparing !== mine || error.name === "AbortError") return;
    if (!(error instanceof Problem)) throw error;
    $("stability-status").textContent = "";
    showProblem(error, compare);
    $("problem").scrollIntoView({ block: "nearest" });
  } finally {
    if (comparing === mine) {
      $("stability-result").classList.remove("stale");
      $("reword").disabled = $("others").disabled = false;
    }
  }
}

function askThis(text) {
  $("question").value = text;
  grow();
  scrollTo({ top: 0 });
  $("question").focus();
  ask();
}

$("stability-form").addEventListener("submit", event => { event.preventDefault(); compare(); });
$("others").addEventListener("click", () => { seed += 1; compare(); });

// Earlier questions of this tab, the last one first; like the key they are gone when it is closed.

const REMEMBERED = 20;

function earlier() {
  try { return JSON.parse(sessionStorage.getItem("invar-asked") ?? "[]"); } catch { return []; }
}

function remember(question) {
  const kept = [question, ...earlier().filter(other => other !== question)].slice(0, REMEMBERED);
  try { sessionStorage.setItem("invar-asked", JSON.stringify(kept)); } catch { /* a full or closed storage */ }
  showHistory();
}

const askButton = text => make("li", {}, make("button", { type: "button", dir: "auto", onclick: () => askThis(text) }, text));

function showHistory() {
  const kept = earlier();
  $("history").querySelector("ol").replaceChildren(...kept.map(askButton));
  $("history").hidden = !kept.length;
}

$("forget").addEventListener("click", () => {
  sessionStorage.removeItem("invar-asked");
  showHistory();
  $("question").focus();
});

// The clipboard is there on loopback and behind TLS only.
$("copy").hidden = !navigator.clipboard;
$("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(asPlainText(asked.question, answered));
    $("copied").textContent = "Copied.";
  } catch {
    $("copied").textContent = "The browser does not allow it.";
  }
});

// The key

let afterKey = null;

function askForKey(then = null, problem = null) {
  afterKey = then;
  $("key").value = key.get();
  $("key-fault").textContent = problem ? (key.get() ? "The service did not accept this key." : "The service asks for a key.") : "";
  $("key-forget").hidden = !key.get();
  if (!$("key-dialog").open) $("key-dialog").showModal();
  $("key").select();
}

function showKey() { $("key-open").textContent = key.get() ? "Key: set" : "Key"; }

$("key-open").addEventListener("click", () => askForKey());
$("key-cancel").addEventListener("click", () => $("key-dialog").close());
$("key-forget").addEventListener("click", () => {
  key.set("");
  showKey();
  $("key-dialog").close();
});
$("key-form").addEventListener("submit", event => {
  event.preventDefault();
  const value = $("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(value)) {
    $("key-fault").textContent = value ? "A key has letters, digits and signs only, no spaces or accents." : "Enter a key.";
    return $("key").focus();
  }
  key.set(value);
  showKey();
  $("key-dialog").close();
  hideProblem();
  describe();
  afterKey?.();
});

// The theme

const THEMES = ["system", "light", "dark"];

function showTheme() { $("theme").textContent = `Theme: ${document.documentElement.dataset.theme ?? "system"}`; }

$("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const next = THEMES[(THEMES.indexOf(root.dataset.theme ?? "system") + 1) % THEMES.length];
  if (next === "system") delete root.dataset.theme;
  else root.dataset.theme = next;
  try { next === "system" ? localStorage.removeItem("invar-theme") : localStorage.setItem("invar-theme", next); } catch { /* for this page only */ }
  showTheme();
});

// What is being served, and what may be asked for.
async function describe() {
  try {
    const { index, versions, limits, examples } = await call("v1/index");
    $("examples").querySelector("ul").replaceChildren(...examples.map(askButton));
    $("examples").hidden = !examples.length;
    $("served").textContent = "index ready";
    $("served").title = index.error ? `The index asked for last is not served: ${index.error}` : Object.entries(versions).map(pair => pair.join(" ")).join("\n");
    $("served").classList.toggle("warning", Boolean(index.error));
    $("question").maxLength = limits.max_question_chars;
    Object.assign($("top-k"), { max: limits.max_top_k, placeholder: `${limits.top_k}` });
    Object.assign($("length"), { max: limits.max_new_tokens, placeholder: `${limits.max_new_tokens}` });
    $("rewrites").max = limits.max_rewrites;
    $("rewrites").value = Math.min(3, limits.max_rewrites);
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    $("served").textContent = problem.status === 401 ? "locked: a key is needed" : "not ready";
    $("served").title = problem.message;
  }
}

showKey();
showHistory();
showTheme();
grow();
describe();
