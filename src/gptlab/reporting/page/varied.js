/* Loss over a varied config key. */

const valueOf = (run) => run.best?.value ?? null;

/** The runs that can be compared by their best value. */
const comparable = (runs) => runs.filter((run) => valueOf(run) !== null && !isExcluded(run));

/** The run with the best value; null if no run can be compared. */
const bestRun = (runs) =>
  comparable(runs).reduce((a, b) => (a === null || isBetter(valueOf(b), valueOf(a)) ? b : a), null);

/** The shown points, each with its runs that have a value. */
function valuedPoints() {
  const shown = comparable(shownRuns());
  return distinct(shown.map((run) => run.point)).map((point) => {
    const runs = shown.filter((run) => run.point === point);
    const values = runs.map(valueOf);
    return { point, runs, values, mean: mean(values), varied: runs[0].varied };
  });
}

/** Config keys with several values. */
const variedKeys = () => DATA.varied.filter((key) => distinct(DATA.runs.map((run) => run.varied[key])).length > 1);

/** Axis type for values: category, linear, or log if their logarithms are more evenly spaced. */
function spacing(values) {
  const sorted = [...values].sort((a, b) => a - b);
  if (!values.every(isNumber)) return { kind: "category", values: [...values].map(value) };
  const spread = (numbers) => {
    const gaps = numbers.slice(1).map((number, i) => number - numbers[i]);
    const middle = mean(gaps);
    return Math.sqrt(mean(gaps.map((gap) => (gap - middle) ** 2))) / middle;
  };
  const [low, high] = [sorted[0], sorted.at(-1)];
  if (low <= 0) return { kind: "linear", values: sorted };
  const log = sorted.length > 2 ? spread(sorted.map(Math.log)) < spread(sorted) : high / low >= 10;
  return { kind: log ? "log" : "linear", values: sorted };
}

function renderVaried() {
  const keys = variedKeys();
  const several = distinct(DATA.runs.filter((run) => valueOf(run) !== null).map((run) => run.point)).length > 1;
  byId("varied-section").hidden = !(keys.length && several);
  if (byId("varied-section").hidden) return;
  if (!keys.includes(CHOSEN.key))
    CHOSEN.key = keys.find((key) => DATA.runs.every((run) => isNumber(run.varied[key]))) ?? keys[0];
  fill(byId("varied-controls"), keys, () => {
    if (keys.length < 2) return [];
    const select = make("select", {
      id: "curve-key",
      onchange: (event) => {
        CHOSEN.key = event.target.value;
        render();
      },
    });
    select.append(...keys.map((key) => make("option", { value: key }, key)));
    return [make("label", {}, "over ", select)];
  });
  if (byId("curve-key")) byId("curve-key").value = CHOSEN.key;
  renderCurve(keys);
  byId("parallel-figure").hidden = keys.length < 2;
  if (keys.length > 1) renderParallel(keys);
}

/** Groups of points that differ only in the selected key. */
function families(points, keys) {
  const rest = keys.filter((key) => key !== CHOSEN.key);
  const found = new Map();
  for (const point of points) {
    const name = rest.map((key) => `${short(key)}=${value(point.varied[key])}`).join(" · ");
    found.set(name, [...(found.get(name) ?? []), point]);
  }
  return [...found];
}

function renderCurve(keys) {
  const points = valuedPoints();
  const axis = spacing(distinct(DATA.runs.map((run) => run.varied[CHOSEN.key])));
  const isCategory = axis.kind === "category";
  const place = ({ varied }) => (isCategory ? plain(value(varied[CHOSEN.key])) : varied[CHOSEN.key]); // also a label
  const lines = families(points, keys);
  const drawn = lines.flatMap(([name, family], i) => familyTraces(plain(name), family, i, axis, place));
  const best = points.length ? points.reduce((a, b) => (isBetter(b.mean, a.mean) ? b : a)) : null;
  if (best) drawn.push(star(place(best), best.mean));
  const ticks = { tickvals: axis.values, ticktext: axis.values.map((one) => plain(value(one))) };
  const order = { categoryorder: "array", categoryarray: axis.values.map(plain) };
  const own = { log: axis.values.length <= 12 ? ticks : {}, category: order, linear: {} }[axis.kind];
  const layout = {
    xaxis: { title: { text: plain(CHOSEN.key) }, type: axis.kind, tickangle: "auto", ...own },
    yaxis: { title: { text: plain(DATA.metric) } },
    ...legendBelow("curve", lines.length, 340),
  };
  draw("curve", drawn, layout, CHOSEN.key);
  byId("curve").setAttribute("aria-label", `The ${extreme()} ${DATA.metric} over ${CHOSEN.key}`);
  byId("curve-caption").textContent = curveCaption(points, best, keys);
}

/** Traces of a family: runs as dots, and a line with error bars through the means of its points. */
function familyTraces(name, family, i, axis, place) {
  const own = color(`c${i % COLORS}`);
  const sorted = axis.kind === "category" ? family : [...family].sort((a, b) => place(a) - place(b));
  const about = { type: "scatter", name, legendgroup: name };
  const dots = {
    ...about,
    x: sorted.flatMap((point) => point.values.map(() => place(point))),
    y: sorted.flatMap((point) => point.values),
    mode: "markers",
    meta: { kind: "runs" },
    showlegend: false,
    marker: { color: faded(own, 0.5), size: 5 },
    text: sorted.flatMap((point) => point.runs.map((run) => plain(titleOf(run)))),
    hovertemplate: "%{text}<br>%{y:.5f}<extra></extra>",
  };
  const bars = {
    array: sorted.map((point) => Math.max(...point.values) - point.mean),
    arrayminus: sorted.map((point) => point.mean - Math.min(...point.values)),
  };
  const means = {
    ...about,
    x: sorted.map(place),
    y: sorted.map((point) => point.mean),
    mode: axis.kind === "category" ? "markers" : "lines+markers",
    meta: { kind: "mean" },
    line: { color: own, width: 2, dash: DASHES[Math.floor(i / COLORS) % DASHES.length] },
    marker: { color: own, size: 9 },
    error_y: { type: "data", symmetric: false, color: own, thickness: 1.5, width: 4, ...bars },
    text: sorted.map((point) => plain(DATA.points[point.point])),
    hovertemplate: "<b>%{text}</b><br>%{y:.5f}<extra></extra>",
  };
  return [dots, means];
}

/** Marker of the best mean. */
function star(x, y) {
  const marker = { symbol: "star", size: 18, color: color("accent"), line: { color: color("card"), width: 1 } };
  const about = { name: "best", meta: { kind: "best" }, showlegend: false, hoverinfo: "skip" };
  return { type: "scatter", mode: "markers", x: [x], y: [y], marker, ...about };
}

function curveCaption(points, best, keys) {
  const sentences = [
    `The ${extreme()} ${DATA.metric} of each run. The line connects the means over seeds; error bars range from the lowest to the highest.`,
  ];
  if (keys.length > 1) sentences.push("One line per combination of the other varied config keys; hover over it for its name.");
  if (best)
    sentences.push(
      `★ ${extreme()} mean: ${fixed(best.mean)}, ${DATA.points[best.point]} (${plural(best.values.length, "run")}).`,
    );
  const shown = shownRuns();
  const compared = comparable(shown);
  const without = shown.filter((run) => !compared.includes(run));
  if (without.length) {
    const states = distinct(without.map(stateLabel)).map(
      (state) => `${without.filter((run) => stateLabel(run) === state).length} ${state}`,
    );
    sentences.push(`Omitted: ${plural(without.length, "run")} (${states.join(", ")}).`);
  }
  return sentences.join(" ");
}
