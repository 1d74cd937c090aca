"use strict";

const $ = (id) => document.getElementById(id);

// Light or dark, as the button was last pressed, else as the system is.
function theme(name) {
  document.documentElement.dataset.theme = name;
  $("theme").setAttribute("aria-pressed", String(name === "dark"));
  try { localStorage.setItem("theme", name); } catch { /* storage may be off */ }
}

function storedTheme() {
  try { return localStorage.getItem("theme"); } catch { return null; }
}

$("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
theme(storedTheme() ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
