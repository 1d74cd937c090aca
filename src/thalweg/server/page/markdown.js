"use strict";

// Blocks of Markdown to nodes, by the same rules as inline.js: no markup but the elements named here, and no more time
// than in proportion to the text.

const MAX_DEPTH = 12; // of lists and quotes in each other

const FENCE = /^( {0,3})(`{3,}(?=[^`]*$)|~{3,})[ \t]*([^\s`]*)/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( {1,4}(?! )|\t|(?= {5})|$)/;
const TASK = /^\[([ xX])\] +/;
const DASHES = /^:?-+:?$/;

// Blocks of `lines` into `parent`; `begun` hears of the line that each begins with.
function blocks(lines, parent, depth, begun = () => {}) {
  for (let i = 0; i < lines.length;) {
    const line = lines[i];
    if (line.trim() === "") { i++; continue; }
    begun(i);
    const deeper = depth < MAX_DEPTH, heading = HEADING.exec(line), fence = FENCE.exec(line);
    if (fence) i = fenced(lines, i, parent, fence);
    else if (heading) i = titled(i, parent, heading);
    else if (RULE.test(line)) { node("hr", parent); i++; }
    else if (deeper && QUOTE.test(line)) i = quoted(lines, i, parent, depth);
    else if (deeper && ITEM.test(line)) i = listed(lines, i, parent, depth);
    else if (isTable(lines, i)) i = tabled(lines, i, parent);
    else i = paragraph(lines, i, parent);
  }
}

// Whether a line ends the paragraph before it.
function begins(line) {
  const item = ITEM.exec(line);
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line)
    || (item !== null && item[0].length < line.length && (!/\d/.test(item[2]) || /^1[.)]$/.test(item[2])));
}

function fenced(lines, i, parent, [, indent, mark, language]) {
  const inside = [], width = indent.length;
  for (i++; i < lines.length; i++) {
    const end = lines[i].trim();
    if (end.length >= mark.length && end === mark[0].repeat(end.length) && lines[i].search(/\S/) < 4) break;
    const spaces = Math.max(0, lines[i].search(/\S|$/));
    inside.push(lines[i].slice(Math.min(width, spaces)));
  }
  const box = node("div", parent, "code"), head = node("div", box, "head");
  node("span", head).textContent = language.slice(0, 40);
  const copy = node("button", head, "copy");
  copy.type = "button";
  copy.textContent = "Copy code";
  const pre = node("pre", box);
  pre.tabIndex = 0; // so that keys can scroll it
  node("code", pre).append(document.createTextNode(inside.join("\n")));
  return i + 1;
}

function titled(i, parent, [, marks, text]) {
  let title = (text ?? "").trimEnd(), end = title.length;
  while (title[end - 1] === "#") end--;
  if (end === 0 || /\s/.test(title[end - 1])) title = title.slice(0, end).trimEnd();
  inline(node(`h${Math.min(6, marks.length + 1)}`, parent), title); // the page's own title is h1
  return i + 1;
}

function quoted(lines, i, parent, depth) {
  const inside = [];
  for (; i < lines.length; i++) {
    const more = QUOTE.exec(lines[i]);
    if (!more && (lines[i].trim() === "" || begins(lines[i]))) break;
    inside.push(more ? lines[i].slice(more[0].length) : lines[i]);
  }
  blocks(inside, node("blockquote", parent), depth + 1);
  return i;
}

function listed(lines, i, parent, depth) {
  const numbered = (item) => /\d/.test(item[2]);
  let item = ITEM.exec(lines[i]);
  const ordered = numbered(item), box = node(ordered ? "ol" : "ul", parent);
  if (ordered) box.start = parseInt(item[2], 10);
  while (item !== null && numbered(item) === ordered) {
    let width = item[0].length + (item[3] === "" ? 1 : 0);
    const inside = [lines[i].slice(width)];
    for (i++; i < lines.length; i++) {
      const line = lines[i], lead = line.search(/\S/);
      if (lead < 0) { inside.push(""); continue; }
      if (lead < width && lead >= item[1].length + 2 && ITEM.test(line)) width = lead; // nested by fewer spaces than it should
      if (lead >= width) inside.push(line.slice(width));
      else if (inside.at(-1) !== "" && !begins(line) && !ITEM.test(line)) inside.push(line);
      else break;
    }
    const task = TASK.exec(inside[0]);
    if (task) inside[0] = (task[1] === " " ? "\u2610 " : "\u2611 ") + inside[0].slice(task[0].length);
    blocks(inside, node("li", box), depth + 1);
    item = i < lines.length && !RULE.test(lines[i]) ? ITEM.exec(lines[i]) : null;
  }
  return i;
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "");
  return (inner.endsWith("|") && !inner.endsWith("\\|") ? inner.slice(0, -1) : inner)
    .split(/(?<!\\)\|/)
    .map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function isTable(lines, i) {
  const next = lines[i + 1];
  if (!next?.includes("|") || !lines[i].includes("|") || !/^[\s|:-]+$/.test(next)) return false;
  const under = cells(next);
  return under.every((cell) => DASHES.test(cell)) && under.length === cells(lines[i]).length;
}

function tabled(lines, i, parent) {
  const scroll = node("div", parent, "table");
  scroll.tabIndex = 0;
  const table = node("table", scroll);
  const sides = cells(lines[i + 1]).map((c) => (c.endsWith(":") ? (c.startsWith(":") ? "center" : "right") : ""));
  const row = (line, part, kind) => {
    const box = node("tr", part);
    for (const [n, text] of cells(line).slice(0, sides.length).entries()) {
      inline(node(kind, box, sides[n]), text);
    }
  };
  row(lines[i], node("thead", table), "th");
  const body = node("tbody", table);
  for (i += 2; i < lines.length && lines[i].trim() !== "" && !begins(lines[i]); i++) row(lines[i], body, "td");
  return i;
}

function paragraph(lines, i, parent) {
  const first = i;
  do i++; while (i < lines.length && lines[i].trim() !== "" && !begins(lines[i]) && !isTable(lines, i));
  inline(node("p", parent), lines.slice(first, i).map((line) => line.trim()).join("\n"));
  return i;
}

// Markdown that comes piece by piece. What is shown of a block stays once the next one has begun, so that a long
// answer is not made anew with each of its words.
class Markdown {
  constructor(box) {
    this.box = box;
    this.source = ""; // of the last block, to which more may come
    this.done = 0; // nodes of the blocks before it
  }

  add(text) {
    this.source += text;
  }

  render() {
    const lines = this.source.split("\n").map((line) => line.replace(/^[ \t]+/, (s) => s.replaceAll("\t", "    ")));
    const made = document.createDocumentFragment(), begun = [];
    blocks(lines, made, 0, (line) => begun.push({ line, nodes: made.childNodes.length }));
    const kept = grown(this.box.childNodes[this.done], made.firstChild) ? 1 : 0;
    if (kept) made.firstChild.remove();
    while (this.box.childNodes.length > this.done + kept) this.box.lastChild.remove();
    this.box.append(made);
    // Whether a block begins at a line is told by it and the next one, which may not be whole yet.
    const last = begun.findLast(({ line }) => line < lines.length - 2);
    if (last === undefined) return;
    this.done += last.nodes;
    this.source = lines.slice(last.line).join("\n");
  }
}

// Code that has only grown stays the same node, with what is selected in it and how far it is scrolled.
function grown(old, made) {
  const [before, after] = [old, made].map((box) => box?.querySelector?.(":scope > pre > code")?.firstChild);
  if (!before || !after?.data.startsWith(before.data)) return false;
  if (old.querySelector("span").textContent !== made.querySelector("span").textContent) return false;
  before.appendData(after.data.slice(before.data.length));
  return true;
}
