"use strict";
(() => {
  const { templates, figures } = JSON.parse(document.getElementById("charts").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 40rem)");
  const config = {
    displaylogo: false,
    responsive: true,
    typesetMath: false, // names may contain dollar signs
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
  };

  const layoutOf = (layout, panels) => {
    const below = { orientation: "h", x: 0, xanchor: "left", y: 1, yanchor: "bottom" };
    const legend = { ...layout.legend, ...(narrow.matches ? below : {}) };
    if (layout.grid && narrow.matches) {
      const columns = Math.min(2, layout.grid.columns);
      const rows = Math.ceil(panels / columns);
      layout.height *= rows / layout.grid.rows;
      layout.grid = { ...layout.grid, rows, columns, xgap: 0.35 };
    }
    return { ...layout, legend, template: templates[dark.matches ? "dark" : "light"] };
  };
  const draw = () => {
    for (const [name, figure] of Object.entries(figures)) {
      // Copies, because Plotly writes what it computes into its arguments.
      const { data, layout } = structuredClone(figure);
      Plotly.react(document.getElementById(`chart-${name}`), data, layoutOf(layout, data.length), config);
    }
    document.documentElement.dataset.drawn = dark.matches ? "dark" : "light";
  };
  for (const query of [dark, narrow]) query.addEventListener("change", draw);
  draw();
})();
