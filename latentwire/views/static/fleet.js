"use strict";
/* The page of all runs: one table, sorted and filtered here. */

const COLUMNS = [
  { key: "name", title: "run", cell: (r) => make("a", { href: `/runs/${encodeURIComponent(r.name)}` }, r.name) },
  { key: "state", title: "state", cell: (r) => make("span", {}, r.state ? stateBadge(r.state) : null, make("span", { className: "quiet" }, r.phase ? ` ${r.phase}` : "")) },
  { key: "progress", title: "progress", value: (r) => (r.total_steps ? r.step / r.total_steps : null), cell: progress },
  { key: "eta_s", title: "remaining", number: true, cell: (r) => words.duration(r.eta_s) },
  { key: "loss", title: "loss", number: true, cell: (r) => words.figure(r.loss) },
  { key: "losses", title: "", cell: spark, value: () => null, fixed: true },
  { key: "samples_per_s", title: "samples/s", number: true, cell: (r) => words.figure(r.samples_per_s, 3) },
  { key: "gpu_percent", title: "GPU", number: true, cell: (r) => (typeof r.gpu_percent !== "number" ? NOTHING : `${Math.round(r.gpu_percent)} %`) },
  { key: "goodput", title: "goodput", number: true, cell: (r) => words.percent(r.goodput) },
  { key: "attempt", title: "attempt", number: true, cell: (r) => String(r.attempt || NOTHING) },
  { key: "num_preemptions", title: "preempted", number: true, cell: (r) => words.whole(r.num_preemptions ?? null) },
  { key: "verified_at", title: "verified", number: true, cell: (r) => words.ago(r.verified_at) },
  { key: "reason", title: "why", words: true, cell: (r) => make("span", { className: "brief", title: r.reason || r.warning || "" }, r.reason || r.warning || "") },
];

class FleetPage {
  constructor(root) {
    this.rows = new Map();
    this.sort = { key: "name", down: false };
    this.state = null;
    this.filter = make("input", { type: "search", placeholder: "filter by name", ariaLabel: "Filter by name", oninput: () => this.show() });
    this.states = make("span", { className: "filters" });
    this.states.style.margin = "0";
    this.body = make("tbody");
    this.heads = COLUMNS.map((column) => {
      const button = column.fixed ? "" : make("button", { type: "button", onclick: () => this.sortBy(column.key) }, column.title);
      return make("th", { scope: "col", className: column.number ? "number" : column.words ? "words" : "" }, button);
    });
    const all = make("table", { ariaLabel: "Runs" }, make("thead", {}, make("tr", {}, ...this.heads)), this.body);
    this.empty = make("p", { className: "quiet" }, "No runs yet.");
    const box = scrolled("Runs", all);
    box.style.maxHeight = "none";
    root.replaceChildren(make("h1", {}, "Runs"), make("section", { ariaLabel: "Runs" },
      make("div", { className: "filters" }, this.filter, this.states), box, this.empty));
    setInterval(() => this.show(), 5000); // ages grow
  }

  take(message) {
    if (message.whole) this.rows.clear();
    message.gone.forEach((name) => this.rows.delete(name));
    message.rows.forEach((row) => this.rows.set(row.name, row));
    this.show();
  }

  sortBy(key) {
    this.sort = { key, down: this.sort.key === key ? !this.sort.down : false };
    this.show();
  }

  show() {
    const all = [...this.rows.values()];
    const counts = new Map();
    all.filter((row) => row.state).forEach((row) => counts.set(row.state, (counts.get(row.state) || 0) + 1));
    const key = JSON.stringify([...counts].sort());
    if (key !== this.statesKey) {
      this.statesKey = key;
      this.states.replaceChildren(...[...counts].sort().map(([state, count]) => make("button", {
        type: "button", className: "plain", onclick: () => { this.state = this.state === state ? null : state; this.show(); },
      }, `${state} ${count}`)));
    }
    [...this.states.children].forEach((button) => button.setAttribute("aria-pressed", String(button.textContent.startsWith(`${this.state} `))));
    const column = COLUMNS.find((each) => each.key === this.sort.key);
    const value = (row) => (column.value ? column.value(row) : row[column.key]);
    const wanted = all.filter((row) => row.name.includes(this.filter.value) && (!this.state || row.state === this.state));
    wanted.sort((a, b) => compare(value(a), value(b)) * (this.sort.down ? -1 : 1) || compare(a.name, b.name));
    this.heads.forEach((head, i) => {
      if (COLUMNS[i].key === this.sort.key) head.setAttribute("aria-sort", this.sort.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    const isShown = COLUMNS.map((each) => each.key !== "gpu_percent" || all.some((row) => typeof row.gpu_percent === "number"));
    this.heads.forEach((head, i) => (head.hidden = !isShown[i]));
    const focused = this.body.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
    this.body.replaceChildren(...wanted.map((row) => make("tr", {}, ...COLUMNS.filter((_, i) => isShown[i]).map((each) =>
      make("td", { className: each.number ? "number" : each.words ? "words" : "" }, each.cell(row))))));
    if (focused) [...this.body.querySelectorAll("a")].find((link) => link.getAttribute("href") === focused)?.focus();
    this.empty.hidden = all.length > 0;
  }
}

function compare(a, b) {
  const isKnown = (value) => value !== null && value !== undefined;
  if (!isKnown(a) || !isKnown(b)) return Number(isKnown(b)) - Number(isKnown(a));
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
}

function progress(row) {
  const share = row.total_steps ? Math.min(1, row.step / row.total_steps) : 0;
  const filled = make("span");
  filled.style.width = `${100 * share}%`;
  const text = row.total_steps ? `${words.whole(row.step)} / ${words.whole(row.total_steps)}` : words.whole(row.step);
  return make("span", {}, make("span", { className: "meter", ariaHidden: "true" }, filled), text);
}

function spark(row) {
  const known = (row.losses || []).map((y, x) => [x, y]).filter(([, y]) => y !== null);
  if (known.length < 2) return "";
  const picture = sketch([{ x: known.map(([x]) => x), y: known.map(([, y]) => y), tint: "series-1" }], 96, 18);
  picture.setAttribute("class", "spark");
  picture.setAttribute("role", "img");
  picture.setAttribute("aria-label", `last ${known.length} losses, from ${words.figure(known[0][1])} to ${words.figure(known[known.length - 1][1])}`);
  return picture;
}

{
  token.take();
  const page = new FleetPage(document.getElementById("main"));
  follow("/api/fleet", (message) => page.take(message.fleet), connection());
}
