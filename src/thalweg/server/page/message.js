"use strict";

// How messages look. `element` and `node` set text, never HTML.
function element(kind, className, parent, text = "") {
  const made = node(kind, parent, className);
  made.textContent = text;
  return made;
}

function button(parent, className, text) {
  const made = element("button", className, parent, text);
  made.type = "button";
  return made;
}

function article(role, label) {
  const box = node("article", $("log"), `message ${role}`);
  box.setAttribute("aria-label", label);
  return box;
}

function userMessage(message) {
  const box = article("user", "You");
  element("div", "text", box, message.content);
  const actions = node("div", box, "actions");
  button(actions, "edit", "Edit").setAttribute("aria-label", "Edit this message and all that follows it");
  button(actions, "copy", "Copy").setAttribute("aria-label", "Copy this message");
  return box;
}

// Results of calls, which the user wrote.
function toolMessage(message) {
  const box = article("tool", "Result of a tool");
  element("div", "text", box, message.content);
  return box;
}

// An answer while it comes and after. What is shown follows what has come at once, but takes at most a fifth of the
// page's time, however long the answer is.
class Answer {
  constructor() {
    this.box = article("assistant", "Assistant");
    this.box.setAttribute("aria-busy", "true"); // read it out when it is whole
    this.text = node("div", this.box, "text markdown");
    this.markdown = new Markdown(this.text);
    this.callList = node("div", this.box, "calls");
    this.thought = this.timer = null;
    this.pending = ""; // of the thought, not shown yet
    this.calls = [];
    this.spent = 0; // milliseconds that showing it took last time
  }

  think(text) {
    if (this.thought === null) {
      this.thoughts = document.createElement("details"); // folded
      this.box.prepend(this.thoughts);
      this.summary = element("summary", "", this.thoughts, "Thinking…");
      this.thought = element("div", "thought", this.thoughts).appendChild(document.createTextNode(""));
      this.thoughtAt = performance.now();
    }
    this.pending += text;
    this.later();
  }

  write(text) {
    this.thinkingEnds();
    this.markdown.add(text);
    this.later();
  }

  call(pieces) {
    this.thinkingEnds();
    addCalls(this.calls, pieces);
    this.later();
  }

  thinkingEnds() {
    if (this.thought === null || this.thoughtFor !== undefined) return;
    this.thoughtFor = (performance.now() - this.thoughtAt) / 1000;
    this.summary.textContent = `Thought for ${this.thoughtFor.toFixed(1)} s`;
  }

  later() {
    this.timer ??= setTimeout(() => this.show(), Math.max(20, 4 * this.spent));
  }

  show() {
    const began = performance.now(), log = $("log");
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
    clearTimeout(this.timer);
    this.timer = null;
    if (this.pending) this.thought.appendData(this.pending);
    this.pending = "";
    this.markdown.render();
    this.calls.forEach((call, i) => {
      const box = this.callList.children[i] ?? this.callBox();
      box.querySelector("code").textContent = call.function.name;
      box.querySelector("pre").textContent = call.function.arguments;
    });
    if (atEnd) log.scrollTop = log.scrollHeight;
    this.spent = performance.now() - began;
  }

  callBox() {
    const box = node("details", this.callList, "call");
    box.open = true;
    node("code", element("summary", "", box, "Calls "));
    node("pre", box).tabIndex = 0;
    return box;
  }

  // Fields for what the calls gave; `send` gets their texts.
  askResults(send) {
    const form = node("form", this.box, "results");
    const fields = this.calls.map((call) => {
      const label = element("label", "", form, `Result of ${call.function.name}`);
      return node("textarea", label);
    });
    button(form, "", "Send results").type = "submit";
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      form.remove();
      send(fields.map((field) => field.value));
    });
  }

  fail(message) {
    element("div", "error", this.box, message).setAttribute("role", "alert");
  }

  end(facts) {
    this.show();
    this.thinkingEnds();
    this.box.removeAttribute("aria-busy");
    element("div", "facts", this.box, facts.join(" · "));
    const actions = node("div", this.box, "actions");
    button(actions, "copy", "Copy").setAttribute("aria-label", "Copy this answer as Markdown");
    button(actions, "retry", "Retry").setAttribute("aria-label", "Answer again");
    $("log").scrollTop = $("log").scrollHeight;
  }
}

// Where pages are not encrypted, browsers have no clipboard but the older way to it.
async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const field = element("textarea", "", document.body, text);
  field.select();
  document.execCommand("copy");
  field.remove();
}
