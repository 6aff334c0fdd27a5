"use strict";
(() => {
  const root = document.documentElement;
  const holders = [...document.querySelectorAll("[data-figure]")];
  const figures = holders.map((h) => JSON.parse(document.getElementById(h.dataset.figure).textContent));
  const paperWidth = 660;

  // plotly reads a little HTML in texts: ours are text only.
  const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const cut = (text, most) => ([...text].length > most ? [...text].slice(0, most - 1).join("") + "…" : text);

  // A figure with the colours of the style sheet as it is now, and with names that fit.
  function dress(value, key, look) {
    if (Array.isArray(value)) return value.map((v) => dress(v, key, look));
    if (value !== null && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, dress(v, k, look)]));
    if (typeof value !== "string") return value;
    if (key.endsWith("color") || key === "colorscale")
      return value.startsWith("--") ? look.style.getPropertyValue(value).trim() : value;
    if (key === "ticktext") return plain(cut(value, look.narrow ? 16 : 48));
    return key === "text" || key === "name" ? plain(cut(value, 80)) : value;
  }

  function draw() {
    const style = getComputedStyle(root);
    const paper = root.dataset.paper !== undefined;
    holders.forEach((holder, i) => {
      const narrow = !paper && holder.clientWidth < 480;
      const { data, layout } = dress(figures[i], "", { style, narrow });
      const colour = (name) => style.getPropertyValue(name).trim();
      Object.assign(layout, {
        width: paper ? paperWidth : undefined, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        hoverlabel: { bgcolor: colour("--raised"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
      });
      layout.font.family = getComputedStyle(document.body).fontFamily;
      if (narrow) layout.font.size = 12;
      Plotly.react(holder, data, layout, { displayModeBar: false, responsive: true });
    });
  }

  // On paper: light colours, a width that fits the sheet. The style sheet opens what is folded.
  addEventListener("beforeprint", () => { root.dataset.paper = ""; draw(); });
  addEventListener("afterprint", () => { delete root.dataset.paper; draw(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
})();
