"use strict";
/* The theme: follows the system until the reader chooses. `themechange` on the document tells the charts. */
(() => {
  const root = document.documentElement;
  const announce = () => document.dispatchEvent(new Event("themechange"));

  const choose = (theme) => {
    root.style.colorScheme = theme === "auto" ? "" : theme;
    announce();
  };
  const remembered = () => {
    try { return localStorage.getItem("kibitz-theme"); } catch { return null; }
  };
  const remember = (theme) => {
    try { localStorage.setItem("kibitz-theme", theme); } catch { /* a page opened from disk may have no storage */ }
  };

  const buttons = document.querySelectorAll("#theme input");
  for (const button of buttons) {
    button.checked = button.value === "auto";
    if (button.value === remembered()) { button.checked = true; choose(button.value); }
    button.addEventListener("change", () => { choose(button.value); remember(button.value); });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", announce);
})();
