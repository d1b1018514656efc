// Runs before the page is drawn: it would else be drawn in the other colours first.
"use strict";
{
  const KEY = "remuda-theme";
  const system = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;

  const isDark = () => (root.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";

  const apply = (chosen) => {
    if (chosen) root.dataset.theme = chosen;
    else delete root.dataset.theme;
  };

  const show = () => {
    document.getElementById("theme").textContent = isDark() ? "Light mode" : "Dark mode";
    document.dispatchEvent(new Event("theme"));
  };

  const toggle = () => {
    const wanted = isDark() ? "light" : "dark";
    // What the system says anyway is not a choice: the page goes on following it.
    const isChoice = wanted !== (system.matches ? "dark" : "light");
    apply(isChoice ? wanted : null);
    if (isChoice) localStorage.setItem(KEY, wanted);
    else localStorage.removeItem(KEY);
    show();
  };

  apply(localStorage.getItem(KEY));
  document.addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", toggle);
    system.addEventListener("change", show);
    show();
  });
}
