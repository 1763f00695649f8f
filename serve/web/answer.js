// The answer with its citations, its passages, and what was measured.

import { $, make, marked, nameOf, percent, seconds, sentence } from "./text.js";

const MARK = /\[\s*\d+(?:\s*[,;\-\u2013]\s*\d+)*\s*\]/g;
const SCORES = { dense: "cosine", bm25: "BM25", hybrid: "score" };
// What the scores of a response are: a reranker's, or by how it was searched.
export const scoreOf = ({ versions, mode }) => (versions.reranker ? "relevance" : SCORES[mode] ?? "score");
const reduced = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

// While the model writes: its text as it comes. Numbers are links only once the service has checked them.
export function showText(text) {
  $("answer").className = "text writing";
  $("answer").replaceChildren(text);
}

export function showPassages(found, score) {
  $("passages").replaceChildren(...found.map(passage => card(passage, score)));
}

function card(passage, score, state = "", answer = "") {
  const tags = { cited: "cited", matched: "holds the answer", unread: "not read: no room in the prompt" };
  const item = make(
    "li",
    { id: `passage-${passage.rank}`, class: `passage ${state}`, tabIndex: -1, data: { id: passage.passage_id } },
    make(
      "header",
      {},
      make("span", { class: "number", "aria-hidden": "true" }, String(passage.number ?? "–")),
      make("h3", {}, nameOf(passage)),
      tags[state] ? make("span", { class: "tag" }, tags[state]) : null,
    ),
    make("p", { dir: "auto" }, ...(state === "cited" || state === "matched" ? marked(passage.text, answer) : [passage.text])),
  );
  const meter = make("span", { class: "meter", "aria-hidden": "true" }, make("span"));
  meter.firstChild.style.width = percent(Math.max(0, Math.min(1, passage.score))).replace(" ", "");
  const foot = make("footer", {}, make("span", { class: "score" }, `${score} `, make("b", {}, passage.score.toFixed(3))), meter);
  const where = passage.place || passage.uri;
  if (where && where !== nameOf(passage)) foot.append(make("span", { class: "place" }, where));
  item.append(foot);
  return item;
}

// The checked answer. Passages are matched by id: those that did not fit the prompt have no number in `reply`.
export function showAnswer(reply, found, written) {
  const cited = new Map(reply.citations.map(citation => [citation.passage_id, citation]));
  const given = new Map(reply.passages.map(passage => [passage.passage_id, passage]));
  const all = [...reply.passages, ...found.filter(passage => !given.has(passage.passage_id))].sort((a, b) => a.rank - b.rank);
  $("passages").replaceChildren(
    ...all.map(passage => {
      const read = given.get(passage.passage_id);
      const source = cited.get(passage.passage_id)?.source;
      const state = !read ? "unread" : source === "matched" ? "matched" : source ? "cited" : "";
      return card({ ...passage, number: read?.number }, scoreOf(reply), state, reply.guess || reply.answer);
    }),
  );
  $("answer").className = "text" + (reply.refused ? " refused" : reply.answer ? "" : " nothing");
  $("answer").replaceChildren(...body(reply, written));
  const notes = reply.notes.map(note => make("li", {}, sentence(note)));
  if (reply.partial) notes.unshift(make("li", { class: "warning" }, `A part of the index did not answer (shard ${reply.missing_shards.join(", ")}): passages may be missing.`));
  $("notes").replaceChildren(...notes);
  showMeasures(reply);
}

function body(reply, written) {
  if (reply.low_confidence) {
    const sure = reply.probability === null ? "" : `, ${percent(reply.probability)} likely to be right`;
    return ["Not sure enough to answer from these passages.", make("span", { class: "guess" }, `Its guess${sure}: ${reply.guess || "nothing"}`)];
  }
  if (reply.refused) return [reply.answer];
  if (!reply.answer) return ["The model wrote no answer. The passages that were found are listed all the same."];
  const byNumber = new Map(reply.citations.map(citation => [citation.number, citation]));
  const links = numbers => numbers.filter(number => byNumber.has(number)).map(number => link(byNumber.get(number)));
  const all = links([...byNumber.keys()]);
  const inline = place(reply, written, links);
  return inline ?? [reply.answer, ...all];
}

// Citations where the model put them, if what it wrote is otherwise what the service made of it.
function place(reply, written, links) {
  const plain = text => text.replace(/\s+/g, " ").replace(/^[ ,;:]+|[ ,;:]+$/g, "");
  if (plain(written.replace(new RegExp(`\\s*${MARK.source}`, "g"), "")) !== plain(reply.answer)) return null;
  const parts = [];
  let end = 0, placed = 0;
  for (const match of written.matchAll(MARK)) {
    const made = links(match[0].includes("-") || match[0].includes("\u2013") ? [] : match[0].match(/\d+/g).map(Number));
    placed += made.length;
    parts.push(written.slice(end, match.index).trimEnd(), ...made);
    end = match.index + match[0].length;
  }
  const seen = new Set(parts.filter(part => part.dataset).map(part => part.dataset.number));
  if (!placed || seen.size < reply.citations.length) return null;
  return [...parts, written.slice(end).trimEnd()];
}

function link(citation) {
  const why = citation.source === "generated" ? "cited by the model" : "the answer stands in it";
  const name = citation.title || citation.document_id;
  return make(
    "a",
    {
      class: "cite",
      href: "#passages",
      title: `${name} (${why})`,
      "aria-label": `Passage ${citation.number}, ${name}`,
      data: { number: citation.number, id: citation.passage_id },
      onclick: event => { event.preventDefault(); light(citation.passage_id, true, event.currentTarget); },
    },
    String(citation.number),
  );
}

let origin = null; // where Escape in a passage goes back to

export function light(passageId, move, from = null) {
  for (const item of document.querySelectorAll("#passages > li")) item.classList.toggle("lit", item.dataset.id === passageId);
  for (const cite of document.querySelectorAll(".cite")) {
    if (cite.dataset.id === passageId) cite.setAttribute("aria-current", "true");
    else cite.removeAttribute("aria-current");
  }
  const item = document.querySelector("#passages > li.lit");
  if (!move || !item) return;
  origin = from;
  item.focus({ preventScroll: true });
  item.scrollIntoView({ block: "nearest", behavior: reduced() ? "auto" : "smooth" });
}

// True if there was something to undo.
export function unlight() {
  const lit = document.querySelector("#passages > li.lit");
  if (!lit) return false;
  if (lit.contains(document.activeElement) && origin?.isConnected) origin.focus();
  light(null, false);
  return true;
}

// Question, answer and what it rests on, for the clipboard.
export function asPlainText(question, reply) {
  const said = reply.low_confidence
    ? `Not sure enough to answer. A guess: ${reply.guess || "nothing"}`
    : `${reply.answer || "(no answer)"} ${reply.citations.map(citation => `[${citation.number}]`).join("")}`.trim();
  const rests = reply.citations.map(({ number, title, document_id, place }) => `[${number}] ${title || document_id}${place ? `, ${place}` : ""}`);
  return [question, "", said, ...(rests.length ? ["", ...rests] : [])].join("\n");
}

function fact(name, value, title) {
  return make("div", title ? { title } : {}, make("dt", {}, name), make("dd", {}, value));
}

function showMeasures(reply) {
  const { retrieve_s: search = 0, generate_s: write = 0, total_s: total = search + write } = reply.timings;
  const [first, second] = $("bar").children;
  const share = Math.min(1, search / (total || 1));
  first.style.flexGrow = share;
  second.style.flexGrow = 1 - share;
  const facts = [fact("search", seconds(search)), fact("answer", seconds(write)), fact("in all", seconds(total))];
  if (reply.probability !== null && (!reply.refused || reply.low_confidence))
    facts.push(fact("certainty", percent(reply.probability), "How likely it is right, as calibrated on train questions with and without their documents"));
  $("timings").replaceChildren(...facts);
  showVersions(reply);
  $("measures").hidden = false;
}

export function showVersions(reply) {
  const facts = Object.entries(reply.versions).map(([name, version]) => fact(name, version));
  $("versions").replaceChildren(...facts, fact("request", reply.request_id));
}
