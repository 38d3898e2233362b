"use strict";
/* The page of a diagnosis: a place in a table leads to its token in the heat-map. */
document.getElementById("content").addEventListener("click", (event) => {
  const button = event.target instanceof Element ? event.target.closest("[data-pair]") : null;
  if (button) {
    const detail = { pair: Number(button.dataset.pair), token: Number(button.dataset.token) };
    document.dispatchEvent(new CustomEvent("showtoken", { detail }));
  }
});
