// The same question in other words: what was found, what was answered, and what of it changed.

import { light, scoreOf } from "./answer.js";
import { changed, make, nameOf, percent, plural } from "./text.js";

const same = (a, b) => (a.refused || b.refused ? a.refused === b.refused : normal(a.answer) === normal(b.answer));
const normal = text => (text ?? "").toLowerCase().replace(/[^\p{L}\p{N}\s]/gu, "").replace(/\b(a|an|the)\b/g, " ").replace(/\s+/g, " ").trim();
// Equal answers of nothing are no agreement.
const silent = wordings => wordings.every(wording => !wording.refused && !wording.answer);
const KINDS = { anchor: "as asked" };

export function stabilityView(result, askThis) {
  const [anchor, ...others] = result.wordings;
  if (!others.length) return [make("p", { class: "lead" }, "There is no other wording of this question that the rules know. Try a longer one.")];
  const columns = order(result.wordings);
  const home = new Map(anchor.passages.map(passage => [passage.passage_id, passage]));
  return [
    make(
      "div",
      { class: "scores" },
      score(result.overlap, "of the passages are shared", "Mean Jaccard overlap of the passages, over all pairs of wordings"),
      result.agreement === null || silent(result.wordings) ? null : score(result.agreement, "of the answers agree", "Share of pairs of wordings with the same answer"),
    ),
    make("p", { class: "verdict" }, verdict(anchor, others)),
    make("ol", { class: "wordings" }, ...result.wordings.map(wording => card(wording, anchor, columns, home, askThis, scoreOf(result)))),
    make("p", { class: "small" }, "A square is a passage, in each row the same one, with its rank there. Filled: the rank of the question as asked; tinted: another rank; outlined: a new passage; dashed: not found."),
  ];
}

function score(value, text, title) {
  const gauge = make("span", { class: "gauge", "aria-hidden": "true" }, make("span"));
  gauge.firstChild.style.width = percent(value).replace(" ", "");
  return make("div", { class: "score-box", title }, make("b", {}, percent(value)), make("span", {}, text), gauge);
}

export function verdict(anchor, others) {
  const ids = wording => wording.passages.map(passage => passage.passage_id).sort().join("\n");
  const moved = others.filter(wording => ids(wording) !== ids(anchor)).length;
  const differ = others.filter(wording => wording.answer !== null && !same(wording, anchor)).length;
  const of = plural(others.length, "other wording");
  const passages = moved ? `${moved} of ${of} found other passages` : `${of} found the same passages`;
  if (anchor.answer === null) return `${passages}.`;
  if (silent([anchor, ...others])) return `${passages}; none of them got an answer.`;
  if ([anchor, ...others].every(wording => wording.refused)) return `${passages}; all of them were refused.`;
  const answers = differ ? `${differ} of them changed the answer` : "none changed the answer";
  return moved || others.length > 1 ? `${passages}; ${answers}.` : `${passages}, and ${differ ? "another" : "the same"} answer.`;
}

// The passages of all wordings, each once: those of the question as asked first, in their order.
function order(wordings) {
  const seen = new Map();
  for (const wording of wordings) for (const passage of wording.passages) if (!seen.has(passage.passage_id)) seen.set(passage.passage_id, passage);
  return [...seen.values()];
}

function card(wording, anchor, columns, home, askThis, score) {
  const first = wording === anchor;
  const ranks = new Map(wording.passages.map(passage => [passage.passage_id, passage]));
  const strip = make(
    "div",
    { class: "strip", "aria-hidden": "true" },
    ...columns.map(({ passage_id: id, title, document_id }) => {
      const here = ranks.get(id), there = home.get(id);
      const state = !here ? "gone" : !there ? "new" : here.rank === there.rank ? "kept" : "moved";
      return make("span", { class: state, title: `${title || document_id}: ${here ? `rank ${here.rank}` : "not found"}` }, here ? String(here.rank) : "");
    }),
  );
  const item = make(
    "li",
    {},
    make("p", { class: "wording", dir: "auto" }, ...(first ? [wording.text] : changed(anchor.text, wording.text))),
    make("p", { class: "kind" }, KINDS[wording.kind] ?? wording.kind.replaceAll("_", " ")),
    strip,
  );
  if (!first) item.append(make("p", { class: "change" }, ...change(wording, anchor, ranks, home)));
  if (wording.answer !== null) item.append(answer(wording, anchor, first));
  if (!first) {
    const fresh = wording.passages.filter(passage => !home.has(passage.passage_id));
    if (fresh.length) item.append(details(fresh, score));
    item.append(make("button", { type: "button", class: "plain", onclick: () => askThis(wording.text) }, "Ask this instead"));
  }
  return item;
}

function change(wording, anchor, ranks, home) {
  const lost = anchor.passages.filter(passage => !ranks.has(passage.passage_id));
  const kept = anchor.passages.length - lost.length;
  const moved = wording.passages.filter(passage => home.has(passage.passage_id) && home.get(passage.passage_id).rank !== passage.rank).length;
  const parts = [`${kept} of ${plural(anchor.passages.length, "passage")} kept${kept ? (moved ? `, ${moved} at another rank` : ", in the same order") : ""}.`];
  if (lost.length) {
    parts.push(" Lost: ");
    lost.forEach((passage, at) =>
      parts.push(at ? ", " : "", make("button", { type: "button", class: "link", onclick: () => light(passage.passage_id, true) }, nameOf(passage))),
    );
    parts.push(".");
  }
  return parts;
}

function answer(wording, anchor, first) {
  const text = wording.refused ? "refused: the passages do not answer it" : wording.answer || "no text";
  if (first) return make("p", { class: "said" }, make("b", {}, "Answer "), text);
  const equal = wording.refused ? "Refused as well" : wording.answer ? "Same answer" : "No text either";
  if (same(wording, anchor)) return make("p", { class: "said equal" }, make("b", {}, equal));
  return make("p", { class: "said other" }, make("b", {}, "Other answer "), text);
}

function details(fresh, score) {
  return make(
    "details",
    {},
    make("summary", {}, `New: ${fresh.map(nameOf).join(", ")}`),
    ...fresh.map(passage => make("p", { class: "fresh-passage", dir: "auto" }, make("b", {}, nameOf(passage)), ` ${passage.text} `, make("span", { class: "small" }, `${score} ${passage.score.toFixed(3)}`))),
  );
}
