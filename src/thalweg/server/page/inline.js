"use strict";

// The text of a block of Markdown, to nodes. The elements are those named here and text is only ever text, so nothing
// that a model writes can become markup. It takes time in proportion to the text, however it is meant.

const MAX_OPEN = 16; // marks of emphasis that may be open at a time

const SPECIAL = /[\\`*_~[!<&]|https?:\/\//g;
const ESCAPED = /[!"#$%&'*+,\-./:;<=>?@^_`{|}~\\]/; // no brackets: \( and \[ are how models begin formulas
const LINK = /\[((?:[^[\]\\]|\\.){0,1000})\]\((?:<([^<>\n]{0,2000})>|((?:[^\s()<>]|\([^\s()<>]{0,500}\)){0,2000}))(?:\s{1,9}"[^"\n]{0,500}")?\s{0,9}\)/y;
const ANGLED = /<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/y;
const BARE = /https?:\/\/[^\s<>"`*|\\]{1,2000}(?![^\s<>"`*|\\])/y;
const ENTITY = /&(?:amp|lt|gt|quot|nbsp|#39);/y;
const ENTITIES = { "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&nbsp;": "\u00a0", "&#39;": "'" };
const STYLES = { "*": "em", "_": "em", "**": "strong", "__": "strong", "~~": "del" };
const LETTER = String.raw`[\p{L}\p{M}\p{N}_-]`; // of a host's name, those of other scripts too
const ENDING = "com|org|net|edu|gov|io|ai|dev|app|co|uk|de|fr|eu|cn|jp|in";
const HOSTS = new RegExp( // after https:// or www., or on its own with a common ending
  String.raw`(?:https?:[\\/@]+|www\.)(${LETTER}+(?:\.${LETTER}+)*)` +
    String.raw`|(?<!${LETTER}\.?)((?:${LETTER}+\.)+(?:${ENDING})(?:\.\p{L}{2})?)(?![\p{L}\p{N}]|\.[\p{L}\p{N}])`, "giu");
const UNSEEN = /[\p{Cf}\p{Default_Ignorable_Code_Point}]|(?!\s)\p{Cc}/gu;
const TURNED = /[\u202d\u202e]/; // text that is shown in another order
const PROTOCOLS = new Set(["http:", "https:", "mailto:"]);

function node(kind, parent, className = "") {
  const made = document.createElement(kind);
  if (className) made.className = className;
  parent.append(made);
  return made;
}

// The address that a link may lead to, or null.
function address(text) {
  if (!/^[a-z]+:/i.test(text)) return null; // a link into this server means nothing
  let url;
  try { url = new URL(text); } catch { return null; }
  return PROTOCOLS.has(url.protocol) && !url.username && !url.password ? url : null;
}

function link(parent, url) {
  const made = node("a", parent);
  made.href = made.title = url.href;
  made.rel = "noopener noreferrer nofollow";
  made.target = "_blank";
  return made;
}

// Whether a link's text names another host than the one it leads to, which has to be shown then. In doubt it does.
function misnamed(text, url) {
  if (url.host === "" || text.replace(/\/$/, "") === url.href.replace(/\/$/, "")) return false;
  const seen = text.replace(UNSEEN, "").normalize("NFKC").toLowerCase();
  const hosts = [...seen.matchAll(HOSTS)].map((found) => (found[1] ?? found[2]).replace(/^www\./, ""));
  return TURNED.test(text) || hosts.some((host) => !`.${url.hostname}`.endsWith(`.${host}`));
}

// Text of one block, with its marks, into `parent`. `links`: whether there may be any.
function inline(parent, text, links = true) {
  const open = []; // marks that wait for their ends: { mark, box }
  let box = parent, plain = "", at = 0;
  const ticks = new Map(); // {length: where runs of so many backticks begin, in order}
  for (const run of text.includes("`") ? text.matchAll(/`+/g) : []) {
    if (!ticks.has(run[0].length)) ticks.set(run[0].length, { at: [], next: 0 });
    ticks.get(run[0].length).at.push(run.index);
  }

  function flush() {
    if (plain) box.append(plain);
    plain = "";
  }

  // open[i] was no mark: it is text, and what is in its box goes to where the box was.
  function undo(i) {
    const [{ mark, box: made }] = open.splice(i, 1);
    const into = made.parentNode;
    into.insertBefore(document.createTextNode(mark), made);
    while (made.firstChild) into.insertBefore(made.firstChild, made);
    made.remove();
    box = open.length ? open.at(-1).box : parent;
  }

  function emphasis(char) {
    let end = at;
    while (text[end] === char) end++;
    const before = text[at - 1] ?? " ", after = text[end] ?? " ";
    const word = /[\p{L}\p{N}]/u;
    let opens = after.trim() !== "", closes = before.trim() !== "";
    if (char === "_") [opens, closes] = [opens && !word.test(before), closes && !word.test(after)];
    let left = end - at;
    at = end;
    if (left > 3 || (char === "~" && left !== 2)) {
      plain += char.repeat(left);
      return;
    }
    while (left > 0) {
      let found = closes ? open.findLastIndex((each) => each.mark === char.repeat(left)) : -1;
      if (closes && found < 0) found = open.findLastIndex((each) => each.mark[0] === char && each.mark.length <= left);
      if (found >= 0) {
        flush();
        while (open.length > found + 1) undo(open.length - 1);
        left -= open.pop().mark.length;
        box = open.length ? open.at(-1).box : parent;
      } else if (opens) {
        flush();
        if (open.length === MAX_OPEN) undo(0);
        const mark = char.repeat(left === 2 ? 2 : 1); // of three, the single one is around the others
        box = node(STYLES[mark], box);
        open.push({ mark, box });
        left -= mark.length;
      } else {
        plain += char.repeat(left);
        left = 0;
      }
    }
  }

  function code() {
    let end = at;
    while (text[end] === "`") end++;
    const runs = ticks.get(end - at); // none of what is left of a run whose first one was escaped
    while (runs?.at[runs.next] < end) runs.next++;
    const close = runs?.at[runs.next];
    if (close === undefined) {
      plain += text.slice(at, end);
      at = end;
      return;
    }
    flush();
    const inner = text.slice(end, close).replaceAll("\n", " ");
    const padded = inner.length > 2 && inner.startsWith(" ") && inner.endsWith(" ") && inner.trim() !== "";
    node("code", box).textContent = padded ? inner.slice(1, -1) : inner;
    at = close + (end - at);
  }

  // A link at `at`, if there is one; pictures are links, for nothing is loaded from elsewhere.
  function linked(picture) {
    if (!links) return false;
    LINK.lastIndex = at + (picture ? 1 : 0);
    const found = LINK.exec(text), end = LINK.lastIndex;
    const url = found === null ? null : address(found[2] ?? found[3]);
    if (url === null) return false;
    flush();
    const made = link(box, url);
    inline(made, found[1] || url.href, false);
    if (misnamed(made.textContent, url)) node("span", made, "host").textContent = ` (${url.host})`;
    at = end;
    return true;
  }

  function written(pattern, group) {
    pattern.lastIndex = at;
    const found = links ? pattern.exec(text) : null;
    if (found === null) return false;
    let given = found[group];
    if (group === 0) { // what ends the sentence is no part of it
      let end = given.length;
      const lacks = (end) => given.lastIndexOf("(", end) < 0;
      while (/[.,;:!?'_~]/.test(given[end - 1]) || (given[end - 1] === ")" && lacks(end))) end--;
      given = given.slice(0, end);
    }
    const url = address(given);
    if (url === null) return false;
    flush();
    link(box, url).textContent = given;
    at += group === 0 ? given.length : found[0].length;
    return true;
  }

  while (at < text.length) {
    SPECIAL.lastIndex = at;
    const found = SPECIAL.exec(text);
    const next = found === null ? text.length : found.index;
    plain += text.slice(at, next);
    at = next;
    if (found === null) break;
    const char = found[0];
    if (char === "`") code();
    else if (char === "*" || char === "_" || char === "~") emphasis(char);
    else if (char === "\\" && ESCAPED.test(text[at + 1] ?? "")) [plain, at] = [plain + text[at + 1], at + 2];
    else if (char === "[" && linked(false)) continue;
    else if (char === "!" && text[at + 1] === "[" && linked(true)) continue;
    else if (char === "<" && written(ANGLED, 1)) continue;
    else if (char.startsWith("http") && written(BARE, 0)) continue;
    else if (char === "&" && ((ENTITY.lastIndex = at), ENTITY.test(text))) {
      plain += ENTITIES[text.slice(at, ENTITY.lastIndex)];
      at = ENTITY.lastIndex;
    } else [plain, at] = [plain + char, at + char.length];
  }
  flush();
  while (open.length) undo(open.length - 1);
}
