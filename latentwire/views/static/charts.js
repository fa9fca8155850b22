"use strict";
/* Charts by plotly. They are drawn when they come into view, and then extended, not drawn anew. */

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

/** Names from files may hold what plotly takes for markup. */
function unmarked(text) {
  return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

/** Plotly shows milliseconds as UTC; shifted, they read as local time. */
function asLocal(ms) {
  return ms - new Date(ms).getTimezoneOffset() * 60000;
}

class Chart {
  /**
   * @param {string} title
   * @param {object} axes  {x: "steps" | "time", unit, range, height}
   */
  constructor(title, axes = {}) {
    this.axes = { height: 190, ...axes };
    this.traces = [];
    this.shapes = [];
    this.annotations = [];
    this.isDrawn = false;
    this.area = make("div", { className: "chart" });
    this.area.style.height = `${this.axes.height}px`;
    this.caption = make("figcaption");
    const unit = axes.unit ? make("span", { className: "quiet" }, ` ${axes.unit}`) : null;
    this.figure = make("figure", {}, make("div", { className: "title" }, title, unit), this.area, this.caption);
    this.area.setAttribute("role", "img");
    this.area.setAttribute("aria-label", title);
    this.title = title;
    Chart.all.add(this);
    Chart.inView.observe(this.area);
  }

  /** Words for who cannot see the picture; they stand below it. */
  say(text) {
    this.caption.textContent = text;
    this.area.setAttribute("aria-label", `${this.title}. ${text}`);
  }

  /** Show these traces instead of all others. */
  replace(traces) {
    this.traces = traces;
    this.redraw();
  }

  /** Add points to a chart that has these traces already: [{index, x, y}], all behind those that are there. */
  extend(additions) {
    const some = additions.filter((addition) => addition.x.length);
    if (!some.length) return;
    if (this.isDrawn) {
      const update = { x: some.map((each) => each.x), y: some.map((each) => each.y) };
      Plotly.extendTraces(this.area, update, some.map((each) => each.index));
      for (const { index } of some) {
        const { x, y } = this.area.data[index];
        Object.assign(this.traces[index], { x, y });
      }
    } else {
      for (const { index, x, y } of some) {
        this.traces[index].x.push(...x);
        this.traces[index].y.push(...y);
      }
    }
  }

  redraw() {
    if (!this.isDrawn) return this.sketch();
    this.revision = (this.revision || 0) + 1;
    Plotly.react(this.area, this.traces.map((trace) => styled(trace)), this.layout(), CHART_OPTIONS);
  }

  draw() {
    this.isWanted = true;
    if (this.isDrawn) return;
    if (!window.Plotly) return this.sketch();
    this.isDrawn = true;
    this.area.replaceChildren();
    Plotly.newPlot(this.area, this.traces.map((trace) => styled(trace)), this.layout(), CHART_OPTIONS);
  }

  /** Its lines at once, while plotly's script is still on its way: a browser takes a second or two to compile it. */
  sketch() {
    const lines = this.traces.filter((trace) => trace.type === "scatter" && trace.y.some((y) => y !== null));
    if (!this.isWanted || !lines.length) return;
    const picture = sketch(lines, 1000, this.axes.height);
    picture.setAttribute("class", "sketch");
    this.area.replaceChildren(picture);
  }

  layout() {
    const [line, quiet, text, panel] = ["line", "quiet", "text", "panel"].map(colour);
    const axis = { gridcolor: colour("faint"), linecolor: line, zeroline: false, tickfont: { color: quiet }, automargin: true };
    const isTime = this.axes.x === "time";
    return {
      datarevision: this.revision,
      uirevision: "kept", // zoom stays where the person put it
      height: this.axes.height,
      margin: { l: 46, r: 10, t: 6, b: 24 },
      paper_bgcolor: panel,
      plot_bgcolor: panel,
      font: { family: "inherit", size: 11, color: text },
      showlegend: this.traces.length > 1 && !this.axes.noLegend,
      legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", font: { size: 11, color: text } },
      hovermode: this.axes.hovermode || "x unified",
      hoverlabel: { bgcolor: panel, bordercolor: line, font: { color: text } },
      xaxis: { ...axis, type: isTime ? "date" : "linear", ...(isTime ? {} : { separatethousands: true, exponentformat: "none" }), ...this.axes.xaxis },
      yaxis: { ...axis, exponentformat: "power", minexponent: 6, range: this.axes.range, rangemode: this.axes.rangemode || "normal", ...this.axes.yaxis },
      barmode: "overlay",
      bargap: 0,
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
      shapes: this.shapes.map((at) => ({
        type: "line", x0: at, x1: at, yref: "paper", y0: 0, y1: 1, line: { color: quiet, width: 1, dash: "dot" },
      })),
      annotations: this.annotations.map(({ at, text: label }) => ({
        x: at, y: 1, yref: "paper", yanchor: "top", xanchor: "left", showarrow: false,
        text: unmarked(label), font: { size: 10, color: quiet },
      })),
    };
  }
}

const CHART_OPTIONS = { displayModeBar: false, responsive: true, doubleClick: "reset" };

Chart.all = new Set();

/** Draw what is in view, as soon as plotly is there: its script is large, and tables do not wait for it. */
Chart.drawWith = (script) => {
  script.addEventListener("load", () => Chart.all.forEach((chart) => chart.isWanted && chart.draw()));
  document.head.append(script);
};
Chart.inView = new IntersectionObserver(
  (entries) => {
    for (const chart of Chart.all) {
      if (entries.some((entry) => entry.isIntersecting && entry.target === chart.area)) chart.draw();
    }
  },
  { rootMargin: "300px" },
);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => Chart.all.forEach((chart) => chart.redraw()));

/** Traces name colours of the style sheet, which differ in light and dark. The points' arrays stay the same ones. */
function styled(trace) {
  const { tint, ...plain } = trace;
  const shade = colour(tint);
  if (plain.type === "bar") return { ...plain, marker: { color: shade, line: { width: 0 } } };
  return { ...plain, line: { width: 1.3, ...plain.line, color: shade }, marker: { size: 5, ...plain.marker, color: shade } };
}

function line(name, tint, x, y, more) {
  return { type: "scatter", mode: "lines", name: unmarked(name), tint, x, y, connectgaps: false, ...more };
}
