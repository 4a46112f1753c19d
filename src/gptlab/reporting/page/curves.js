/* Curves of a metric over the selected axis; the seeds of a point are drawn as mean and band. */

const TIME = [
  [172800, 86400, "days"],
  [7200, 3600, "hours"],
  [180, 60, "minutes"],
  [0, 1, "seconds"],
];

const AXES = {
  tokens: { label: "tokens", title: () => "tokens", of: (curve) => curve.tokens, layout: {} },
  step: { label: "steps", title: () => "optimizer steps", of: (curve) => curve.step, layout: {} },
  flops: {
    label: "FLOPs",
    title: () => "training FLOPs (tokens × FLOPs per token)",
    layout: { exponentformat: "power" },
    of: (curve, run) => curve.tokens.map((tokens) => (run.flops === null ? null : tokens * run.flops)),
  },
  time: {
    label: "time",
    title: () => `training time, ${timeUnit()[2]}`,
    layout: {},
    of: (curve) => {
      const unit = timeUnit()[1];
      return curve.seconds.map((seconds) => seconds / unit);
    },
  },
};

/** Unit of time for the longest run: [from, seconds per unit, name]. */
function timeUnit() {
  let longest = 0;
  for (const run of DATA.runs)
    for (const curve of Object.values(run.series)) longest = Math.max(longest, curve.seconds.at(-1) ?? 0);
  return TIME.find(([from]) => longest >= from);
}

/** Curve of a metric over the selected axis: {x, y, run}; null if the run does not have it. */
function curveOf(run, metric) {
  const curve = run.series[metric];
  if (!curve) return null;
  const x = AXES[CHOSEN.axis].of(curve, run);
  return x.length && x[0] !== null ? { x, y: curve.value, steps: curve.step, run } : null;
}

/** Mean, lowest and highest value of curves at the steps that all of them have; x is the mean of their positions. */
function meanAndRange(curves) {
  const found = { x: [], mean: [], low: [], high: [] };
  const places = curves.map((curve) => new Map(curve.steps.map((step, i) => [step, i])));
  for (const step of curves[0].steps) {
    const here = places.map((place) => place.get(step));
    if (here.includes(undefined)) continue;
    const values = curves.map((curve, i) => curve.y[here[i]]);
    if (values.includes(null)) continue;
    found.x.push(mean(curves.map((curve, i) => curve.x[here[i]])));
    found.mean.push(mean(values));
    found.low.push(Math.min(...values));
    found.high.push(Math.max(...values));
  }
  return found;
}

/** Concatenates curves to one trace, with gaps between them. */
function joined(curves) {
  const trace = { x: [], y: [], text: [] };
  for (const curve of curves) {
    if (trace.x.length) for (const list of Object.values(trace)) list.push(null);
    trace.x.push(...curve.x);
    trace.y.push(...curve.y);
    trace.text.push(...curve.x.map(() => plain(curve.run.name)));
  }
  return trace;
}

/** Traces of a metric for the shown runs. */
function traces(metric, style) {
  const found = [];
  const shown = shownRuns();
  for (const point of distinct(shown.map((run) => run.point))) {
    const curves = shown
      .filter((run) => run.point === point)
      .map((run) => curveOf(run, metric))
      .filter(Boolean);
    if (!curves.length) continue;
    const { color: own, dash } = look(point);
    const name = plain(DATA.points[point]);
    const about = (kind) => ({ type: "scatter", name, meta: { point, metric, kind } });
    const hover = `<b>%{fullData.name}</b><br>${plain(metric)} %{y:.5~g} at %{x:.4~s}`;
    const seeds = curves.filter((curve) => !isExcluded(curve.run));
    if (curves.length > 1 && CHOSEN.singles) {
      const line = { color: faded(own, style.faint ?? 0.4), width: 1, dash };
      found.push({
        ...about("runs"),
        ...joined(curves),
        mode: "lines",
        line,
        hovertemplate: `${hover}<br>%{text}<extra></extra>`,
      });
    }
    if (curves.length === 1 || seeds.length === 1) {
      const curve = seeds[0] ?? curves[0];
      found.push({
        ...about("run"),
        ...joined([curve]),
        ...lineOf(style, own, dash, curve.x.length),
        hovertemplate: `${hover}<br>%{text}<extra></extra>`,
      });
    } else if (seeds.length > 1) {
      const { x, mean: middle, low, high } = meanAndRange(seeds);
      const band = { x: [...x, ...[...x].reverse()], y: [...high, ...[...low].reverse()] };
      found.push({
        ...about("band"),
        ...band,
        mode: "lines",
        line: { width: 0 },
        fill: "toself",
        fillcolor: faded(own, 0.18),
        hoverinfo: "skip",
      });
      found.push({
        ...about("mean"),
        x,
        y: middle,
        ...lineOf(style, own, dash, x.length),
        hovertemplate: `${hover}<br>mean of ${seeds.length} seeds<extra></extra>`,
      });
    }
  }
  return found;
}

function lineOf(style, own, dash, length) {
  const line = { color: style.alpha ? faded(own, style.alpha) : own, width: style.width, dash };
  return { mode: style.markers && length <= 60 ? "lines+markers" : "lines", line, marker: { size: 5, color: own } };
}

/** Layout of the selected x-axis. */
function xAxis() {
  const axis = AXES[CHOSEN.axis];
  return { title: { text: axis.title() }, type: CHOSEN.logX ? "log" : "linear", ...axis.layout };
}
