// Small helpers that make elements and words; nothing here ever parses text as HTML.

export const $ = id => document.getElementById(id);

export function make(tag, options = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "class") node.className = value;
    else if (name === "data") Object.assign(node.dataset, value);
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node && !name.startsWith("aria")) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter(child => child !== null && child !== undefined));
  return node;
}

export const seconds = value => (value < 0.995 ? `${Math.max(1, Math.round(value * 1000))} ms` : `${value.toFixed(value < 9.95 ? 1 : 0)} s`);
export const percent = value => `${Math.round(value * 100)} %`;
export const plural = (count, one, many = `${one}s`) => `${count} ${count === 1 ? one : many}`;
export const sentence = text => text.charAt(0).toUpperCase() + text.slice(1);
export const nameOf = passage => passage.title || passage.document_id;

// The text with every whole-word occurrence of `wanted` marked.
export function marked(text, wanted) {
  const words = wanted.trim().split(/\s+/).filter(Boolean).map(word => word.replace(/[.*+?^${}()|[\]\\\/]/g, "\\$&"));
  if (!words.length) return [text];
  const pattern = new RegExp(`(?<![\\p{L}\\p{N}])${words.join("\\s+")}(?![\\p{L}\\p{N}])`, "giu");
  const parts = [];
  let end = 0;
  for (const match of text.matchAll(pattern)) {
    parts.push(text.slice(end, match.index), make("mark", {}, match[0]));
    end = match.index + match[0].length;
  }
  return [...parts, text.slice(end)];
}

// The words of `after`, those that are not in `before` (by longest common subsequence) as <ins>.
export function changed(before, after) {
  const a = before.split(/\s+/).filter(Boolean), b = after.split(/\s+/).filter(Boolean);
  const table = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      table[i][j] = a[i] === b[j] ? table[i + 1][j + 1] + 1 : Math.max(table[i + 1][j], table[i][j + 1]);
  const parts = [];
  let i = 0;
  for (let j = 0; j < b.length; j++) {
    while (i < a.length && a[i] !== b[j] && table[i + 1][j] >= table[i][j + 1]) i++;
    const same = i < a.length && a[i] === b[j];
    if (same) i++;
    const last = parts.at(-1);
    if (same) parts.push(`${b[j]} `);
    else if (last?.tagName === "INS") last.append(` ${b[j]}`);
    else parts.push(make("ins", {}, b[j]));
    if (!same && (j + 1 === b.length || b[j + 1] === a[i])) parts.push(" ");
  }
  return parts;
}
