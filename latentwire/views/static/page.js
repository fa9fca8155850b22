"use strict";
/* Elements and words. What comes from files enters the page through textContent only. */

/** An element with properties, classes and children; a string child becomes text. */
function make(tag, properties, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties || {})) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Lines without axes, [{x, y, tint}], in a picture of this size; a null y leaves a gap. */
function sketch(lines, width, height) {
  const xs = lines.flatMap((line) => line.x);
  const ys = lines.flatMap((line) => line.y).filter((y) => y !== null);
  const scale = (values, length) => {
    const low = Math.min(...values);
    const span = Math.max(...values) - low || 1;
    return (value) => (1.5 + ((length - 3) * (value - low)) / span).toFixed(1);
  };
  const across = scale(xs, width);
  const up = scale(ys.map((y) => -y), height);
  const element = (name) => document.createElementNS("http://www.w3.org/2000/svg", name);
  const picture = element("svg");
  picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
  picture.setAttribute("preserveAspectRatio", "none");
  for (const { x, y, tint } of lines) {
    const path = element("path");
    path.setAttribute("d", y.map((value, i) => (value === null ? "" : `${i && y[i - 1] !== null ? "L" : "M"}${across(x[i])} ${up(-value)}`)).join(""));
    path.style.stroke = `var(--${tint})`;
    picture.append(path);
  }
  return picture;
}

const NOTHING = "–";

const words = {
  /** Seconds between the browser's clock and that of the machine that reads the files. */
  behind_s: 0,

  now() {
    return Date.now() / 1000 + words.behind_s;
  },

  figure(value, digits = 4) {
    if (value === null || value === undefined) return NOTHING;
    if (typeof value !== "number") return String(value);
    if (value !== 0 && Math.abs(value) < 1e-4) return value.toExponential(2);
    return Math.abs(value) >= 1e4 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(digits)));
  },

  whole(value) {
    return typeof value === "number" ? value.toLocaleString("en") : NOTHING;
  },

  percent(share, digits = 1) {
    return typeof share === "number" ? `${(100 * share).toFixed(digits)} %` : NOTHING;
  },

  duration(seconds) {
    if (typeof seconds !== "number" || !(seconds >= 0)) return NOTHING;
    if (seconds < 10) return `${Number(seconds.toPrecision(2))} s`;
    if (seconds < 60) return `${Math.round(seconds)} s`;
    const minutes = Math.floor(seconds / 60);
    if (minutes < 60) return `${minutes} min ${Math.floor(seconds % 60)} s`;
    const hours = Math.floor(minutes / 60);
    if (hours < 24) return `${hours} h ${minutes % 60} min`;
    return `${Math.floor(hours / 24)} d ${hours % 24} h`;
  },

  ago(time) {
    if (typeof time !== "number") return NOTHING;
    const seconds = words.now() - time;
    if (seconds < 2) return "just now";
    if (seconds < 60) return `${Math.round(seconds)} s ago`;
    return seconds < 3600 ? `${Math.floor(seconds / 60)} min ago` : `${words.duration(seconds)} ago`;
  },

  size(bytes) {
    if (typeof bytes !== "number") return NOTHING;
    const units = ["B", "kB", "MB", "GB", "TB"];
    let power = 0;
    while (bytes >= 999.95 && power < units.length - 1) {
      bytes /= 1000;
      power += 1;
    }
    return `${power ? bytes.toFixed(1) : bytes} ${units[power]}`;
  },

  /** Local time; with the day where it is not today. */
  time(ms) {
    if (typeof ms !== "number" || !(ms > 0) || ms > 8e15) return NOTHING;
    const two = (value) => String(value).padStart(2, "0");
    const date = new Date(ms);
    const clock = `${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;
    const day = `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`;
    return new Date(words.now() * 1000).toDateString() === date.toDateString() ? clock : `${day} ${clock}`;
  },
};

const STATE_CLASS = {
  RUNNING: "busy", DONE: "good", STALLED: "bad", FAILED: "bad", LOST: "bad", RETRYING: "warn", UNREADABLE: "bad",
  PREEMPTED: "warn", REQUEUED: "warn", PENDING: "off", STOPPED: "off", CANCELLED: "off",
};

function stateBadge(state) {
  return make("span", { className: `state ${STATE_CLASS[state] || "off"}` }, state);
}

/** A table; columns are {title, number, words}, rows arrays of strings or elements. */
function table(caption, columns, rows) {
  const classes = columns.map((column) => [column.number && "number", column.words && "words"].filter(Boolean).join(" "));
  const head = columns.map((column, i) => make("th", { scope: "col", className: classes[i] }, column.title));
  const body = rows.map((row) => make("tr", {}, ...row.map((cell, i) => make("td", { className: classes[i] }, cell))));
  return make(
    "table",
    { ariaLabel: caption },
    make("thead", {}, make("tr", {}, ...head)),
    make("tbody", {}, ...body),
  );
}

/** A part that scrolls must be reachable by keyboard. */
function scrolled(label, content) {
  const box = make("div", { className: "scroll", tabIndex: 0 }, content);
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", label);
  return box;
}
