"use strict";

const $ = (id) => document.getElementById(id);

// Light or dark, as the button was last pressed, else as the system is.
const darkSystem = matchMedia("(prefers-color-scheme: dark)");
let chosen = null;
try { chosen = localStorage.getItem("theme"); } catch { /* storage may be off */ }

function theme() {
  const name = chosen ?? (darkSystem.matches ? "dark" : "light");
  document.documentElement.dataset.theme = name;
  $("theme").setAttribute("aria-pressed", String(name === "dark"));
}

$("theme").addEventListener("click", () => {
  chosen = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  try { localStorage.setItem("theme", chosen); } catch { /* storage may be off */ }
  theme();
});
darkSystem.addEventListener("change", theme);
theme();
