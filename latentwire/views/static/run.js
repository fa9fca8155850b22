"use strict";
/* The page of one run. `apply` takes the sections that views/run_page.py makes, all of them or those that changed. */

const KIND_ORDER = [
  "training", "redoing", "saving", "evaluating", "starting", "loading", "restoring", "draining", "failed", "queued", "stopped",
];
const GAP_TITLES = { samples_per_s: "Samples per second", lr: "Learning rate", grad_norm: "Gradient norm" };

class RunPage {
  constructor(root) {
    this.head = make("div");
    this.timeline = new Chart("Timeline", { x: "time", height: 108, hovermode: "closest", noLegend: true, yaxis: { visible: false, fixedrange: true } });
    this.legend = make("div", { className: "quiet" });
    this.timeline.caption.replaceWith(this.legend);
    this.loss = new Chart("Loss", { unit: "by step", height: 300 });
    this.rest = Object.fromEntries(Object.entries(GAP_TITLES).map(([key, title]) => [key, new Chart(title, { unit: "by step", height: 150 })]));
    this.panels = new Map();
    this.gpuGrid = make("div", { className: "small-charts" }, make("p", { className: "quiet" }, "No monitor has written yet."));
    this.parts = Object.fromEntries(
      ["goodput", "lost", "attempts", "checkpoints", "alerts", "events", "log"].map((name) => [name, make("div")]),
    );
    this.log = { attempt: null, stdout: "", stderr: "" };
    this.logName = "stdout";
    const section = (title, className, ...content) => make("section", { className, ariaLabel: title }, make("h2", {}, title), ...content);
    const small = make("div", { className: "small-charts" }, ...Object.values(this.rest).map((chart) => chart.figure));
    root.replaceChildren(
      make("section", { ariaLabel: "Status" }, this.head),
      make("section", { ariaLabel: "Timeline" }, this.timeline.figure),
      make("section", { ariaLabel: "Curve" }, this.loss.figure, small),
      section("GPUs and hosts", "", this.gpuGrid),
      make(
        "div",
        { className: "columns" },
        make("div", {}, section("Goodput", "", this.parts.goodput, this.parts.lost), section("Checkpoints", "", this.parts.checkpoints)),
        make("div", {}, section("Alerts", "", this.parts.alerts), section("Attempts", "", this.parts.attempts), section("Log", "", this.parts.log)),
      ),
      section("Events", "", this.parts.events),
    );
    setInterval(() => this.status && this.showStatus(), 1000);
  }

  apply(sections) {
    for (const [name, section] of Object.entries(sections)) {
      const show = this[`show_${name}`];
      if (show) show.call(this, section);
    }
  }

  show_status(status) {
    this.status = status;
    this.showStatus();
  }

  showStatus() {
    const s = this.status;
    const share = s.total_steps ? ` of ${words.whole(s.total_steps)}` : "";
    const facts = [
      ["Step", words.whole(s.step), share],
      ["Remaining", words.duration(s.eta_s)],
      ["Loss", words.figure(s.loss)],
      ["Samples/s", words.figure(s.samples_per_s)],
      ["Goodput", words.percent(s.goodput)],
      ["Attempt", s.attempt || NOTHING],
      ["Preemptions", s.num_preemptions, s.num_lost ? ` + ${s.num_lost} lost` : ""],
      ["Committed", s.committed_step === null ? NOTHING : `step ${words.whole(s.committed_step)}`],
      ["Verified", words.ago(s.verified_at)],
      ["Job", s.job_id || NOTHING],
    ];
    const notices = [];
    const add = (level, text) => text && notices.push(make("p", { className: `notice ${level}` }, make("span", {}, text)));
    add(s.state === "RUNNING" || s.state === "REQUEUED" ? "warn" : STATE_CLASS[s.state] || "off", s.reason);
    add("warn", s.warning && (s.advice ? `${s.warning}. To change it: ${s.advice}` : s.warning));
    const list = make("dl", { className: "facts" }, ...facts.map(([title, value, more]) =>
      make("div", {}, make("dt", {}, title), make("dd", {}, String(value), more ? make("small", {}, more) : null))));
    if (!this.title) {
      this.title = make("h1", {}, s.name);
      this.badges = make("span");
      this.actions = make("span", { className: "actions" });
      this.details = make("div");
      this.head.replaceChildren(make("div", { className: "head" }, this.title, this.badges, this.actions), this.details);
    }
    document.title = `${s.name} ${s.state}`;
    this.badges.replaceChildren(stateBadge(s.state), make("span", { className: "quiet" }, s.phase ? ` ${s.phase}` : ""));
    this.details.replaceChildren(...notices, list);
  }

  show_timeline(spans) {
    const traces = KIND_ORDER.map((kind) => {
      const own = spans.filter((span) => span.kind === kind && span.end > span.begin);
      return {
        type: "bar", orientation: "h", name: kind, tint: kind, width: 1, y: own.map(() => 0),
        base: own.map((span) => asLocal(span.begin)), x: own.map((span) => span.end - span.begin),
        text: own.map((span) => unmarked(
          `${span.mixed ? "mostly " : ""}${kind}${span.attempt ? `, attempt ${span.attempt}` : ""}${span.cause ? ` (${span.cause})` : ""}: ${words.duration((span.end - span.begin) / 1000)}`)),
        textposition: "none", hovertemplate: "%{text}<extra></extra>",
      };
    }).filter((trace) => trace.x.length);
    const starts = new Map();
    for (const span of spans) if (span.attempt && !starts.has(span.attempt)) starts.set(span.attempt, asLocal(span.begin));
    this.timeline.annotations = starts.size > 24 ? [] : [...starts].map(([number, at]) => ({ at, text: String(number) }));
    this.timeline.shapes = [...starts.values()];
    if (spans.length) this.timeline.axes.xaxis = { range: [asLocal(spans[0].begin), asLocal(spans[spans.length - 1].end)] };
    this.timeline.replace(traces);
    if (new Set(spans.map((span) => span.attempt)).size > 40) this.timeline.shapes = [];
    const sums = KIND_ORDER.map((kind) => [kind, spans.filter((s) => s.kind === kind).reduce((sum, s) => sum + s.end - s.begin, 0)]);
    const present = sums.filter(([, ms]) => ms > 0);
    this.legend.replaceChildren(...present.map(([kind]) => make("span", {}, swatch(kind), `${kind}\u2003`)));
    this.timeline.area.setAttribute("aria-label", `Timeline. ${present.map(([kind, ms]) => `${kind} ${words.duration(ms / 1000)}`).join(", ")}`);
  }

  show_curve(curve) {
    const series = Object.fromEntries(curve.series.map((each) => [each.key, each]));
    const own = (key) => series[key] || { x: [], y: [] };
    this.loss.shapes = curve.borders.slice(1).map((border) => border.step);
    this.loss.annotations = curve.borders.length > 24 || curve.borders.length < 2 ? [] : curve.borders.map(({ attempt, step }) => ({ at: step, text: String(attempt) }));
    const bordersKey = JSON.stringify(curve.borders);
    const sameBorders = bordersKey === this.bordersKey;
    this.bordersKey = bordersKey;
    const losses = [own("loss"), own("eval/loss")];
    if (curve.from === null || !this.loss.traces.length) {
      this.loss.replace([
        line("loss", "series-1", losses[0].x, losses[0].y),
        line("eval/loss", "series-2", losses[1].x, losses[1].y, { mode: "lines+markers" }),
      ]);
      for (const [key, chart] of Object.entries(this.rest)) chart.replace([line(GAP_TITLES[key], "series-1", own(key).x, own(key).y)]);
    } else {
      grow(this.loss, losses, curve.from, !sameBorders);
      for (const [key, chart] of Object.entries(this.rest)) grow(chart, [own(key)], curve.from);
    }
    const [loss, evaluation] = this.loss.traces;
    const known = loss.y.filter((value) => value !== null);
    const parts = [curve.num_points === null ? "a first look, all steps are being read" : `${words.whole(curve.num_points)} steps`];
    if (known.length) parts.push(`first ${words.figure(known[0])}, last ${words.figure(known[known.length - 1])}`);
    if (evaluation.y.length) parts.push(`last evaluation ${words.figure(evaluation.y[evaluation.y.length - 1])}`);
    if (curve.borders.length > 1) parts.push(`${curve.borders.length} attempts, a dotted line where each began`);
    if (curve.num_not_finite) parts.push(`${words.whole(curve.num_not_finite)} steps with a loss that is no number`);
    this.loss.say(parts.join("; "));
    for (const [key, chart] of Object.entries(this.rest)) {
      const values = chart.traces[0].y;
      chart.figure.hidden = !values.some((value) => value !== null);
      chart.say(values.length ? `last ${words.figure(values[values.length - 1])}` : "");
    }
  }

  show_gpus(gpus) {
    if (gpus.replace && gpus.panels.length) {
      this.panels.forEach((chart) => Chart.all.delete(chart));
      const kept = new Map();
      for (const panel of gpus.panels) {
        const isShare = panel.unit === "%";
        const chart = this.panels.get(panel.key) || new Chart(panel.title, { x: "time", unit: panel.unit, height: 150, range: isShare ? [0, 101] : undefined, rangemode: "tozero" });
        Chart.all.add(chart);
        kept.set(panel.key, chart);
      }
      this.panels = kept;
      this.gpuGrid.replaceChildren(...[...kept.values()].map((chart) => chart.figure));
    }
    for (const panel of gpus.panels) {
      const chart = this.panels.get(panel.key);
      if (!chart) continue;
      const local = panel.series.map((series) => ({ ...series, x: series.x.map(asLocal) }));
      if (gpus.replace) chart.replace(local.map((s, i) => line(s.name, `series-${1 + (i % 8)}`, s.x, s.y)));
      else chart.extend(local.map((s) => ({ index: chart.traces.findIndex((t) => t.name === unmarked(s.name)), x: s.x, y: s.y })).filter((s) => s.index >= 0));
      const lasts = chart.traces.map((trace) => {
        const last = trace.y.filter((value) => value !== null).pop();
        return `${chart.traces.length > 1 ? `${trace.name} ` : ""}${words.figure(last, 3)} ${panel.unit}`;
      });
      chart.say(lasts.length > 4 ? `last of ${lasts.length}: ${lasts[0]} …` : `last ${lasts.join(", ")}`);
    }
  }

  show_goodput(account) {
    const whole = account.wall_s || 1;
    const rows = account.seconds.map(([kind, seconds]) => {
      const share = make("span", { className: "share" });
      share.style.width = `${Math.max(1, (120 * seconds) / whole)}px`;
      share.style.background = `var(--${kind})`;
      return [make("span", {}, swatch(kind), kind), words.duration(seconds), words.percent(seconds / whole), share];
    });
    this.parts.goodput.replaceChildren(
      make("p", {}, make("strong", {}, words.percent(account.goodput)), ` of ${words.duration(account.allotted_s)} allotted was training that stood`,
        account.gpu_hours ? `; ${words.figure(account.gpu_hours)} GPU-hours held` : ""),
      table("Time by class", [{ title: "class" }, { title: "time", number: true }, { title: "share", number: true }, { title: "" }], rows),
    );
    const lost = account.lost.map(([cause, seconds, hours]) => [cause, words.duration(seconds), account.gpu_hours ? words.figure(hours) : NOTHING]);
    this.parts.lost.replaceChildren(...(lost.length ? [
      table("Time lost by cause", [{ title: "not training, due to" }, { title: "time", number: true }, { title: "GPU-hours", number: true }], lost),
    ] : []));
  }

  show_attempts(attempts) {
    const rows = attempts.slice().reverse().map((a) => [
      String(a.number), words.time(a.begin), words.duration(a.end === null ? null : (a.end - a.begin) / 1000), words.whole(a.step),
      [a.outcome, a.cause].filter(Boolean).join(", ") || NOTHING, a.host || NOTHING, a.error || "",
    ]);
    this.parts.attempts.replaceChildren(scrolled("Attempts", table("Attempts", [
      { title: "#", number: true }, { title: "began" }, { title: "took", number: true }, { title: "step", number: true },
      { title: "outcome" }, { title: "host" }, { title: "", words: true },
    ], rows)));
  }

  show_checkpoints(checkpoints) {
    const level = { verified: "good", committed: "warn", bad: "bad", quarantined: "bad" };
    const rows = checkpoints.map((c) => [
      c.step === null ? c.name : words.whole(c.step), make("span", { className: level[c.state] }, c.state),
      c.created ? words.time(c.created * 1000) : NOTHING, c.attempt ? String(c.attempt) : NOTHING, words.size(c.bytes),
      c.error || Object.entries(c.metrics || {}).map(([name, value]) => `${name} ${words.figure(value)}`).join(", "),
    ]);
    this.parts.checkpoints.replaceChildren(rows.length ? scrolled("Checkpoints", table("Checkpoints", [
      { title: "step", number: true }, { title: "state" }, { title: "made" }, { title: "attempt", number: true },
      { title: "size", number: true }, { title: "", words: true },
    ], rows)) : make("p", { className: "quiet" }, "None yet."));
  }

  show_events(events) {
    const rows = (list) => list.map((e) => [words.time(e.time * 1000), e.attempt ? String(e.attempt) : NOTHING,
      make("span", { className: e.level === "alarm" ? "bad" : e.level === "warning" ? "warn" : "" }, e.text)]);
    const columns = [{ title: "time" }, { title: "attempt", number: true }, { title: "", words: true }];
    const grave = events.filter((e) => e.level || e.event === "alert_over");
    this.parts.alerts.replaceChildren(grave.length ? scrolled("Alerts", table("Alerts", columns, rows(grave)))
      : make("p", { className: "quiet" }, "Nothing to warn of."));
    this.parts.events.replaceChildren(scrolled("Events", table("Events", columns, rows(events))));
  }

  show_log(log) {
    this.log = log;
    if (!this.logText) {
      this.logText = make("pre", { tabIndex: 0, ariaLabel: "Log" });
      this.logOf = make("span", { className: "quiet" });
      const choose = (name) => make("button", { type: "button", onclick: () => { this.logName = name; this.show_log(this.log); } }, name);
      this.logButtons = ["stdout", "stderr"].map(choose);
      this.parts.log.replaceChildren(make("div", { className: "tabs" }, ...this.logButtons, this.logOf), this.logText);
    }
    this.logButtons.forEach((button) => button.setAttribute("aria-pressed", String(button.textContent === this.logName)));
    this.logOf.textContent = log.attempt ? `the end of it, rank 0 of attempt ${log.attempt}` : "not started yet";
    const isAtEnd = this.logText.scrollTop + this.logText.clientHeight >= this.logText.scrollHeight - 4;
    this.logText.textContent = log[this.logName] || "(nothing)";
    if (isAtEnd) this.logText.scrollTop = this.logText.scrollHeight;
  }
}

/** Bring charts up to date: points from step `from` on are void, the new ones follow. */
function grow(chart, series, from, mustRedraw = false) {
  let cut = mustRedraw;
  chart.traces.forEach((trace) => {
    let keep = trace.x.length;
    while (keep > 0 && trace.x[keep - 1] >= from) keep -= 1;
    if (keep < trace.x.length) {
      trace.x.length = trace.y.length = keep;
      cut = true;
    }
  });
  if (!cut) {
    chart.extend(series.map(({ x, y }, index) => ({ index, x, y })));
    return;
  }
  chart.traces.forEach((trace, index) => {
    trace.x.push(...series[index].x);
    trace.y.push(...series[index].y);
  });
  chart.redraw();
}

function swatch(kind) {
  const box = make("span", { className: "swatch" });
  box.style.background = `var(--${kind})`;
  return box;
}
