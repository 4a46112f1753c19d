/* Loss over compute for runs of several sizes and token counts, with the fitted scaling law if there is one. */

/** The fitted scaling law: {law: {E, A, B, alpha, beta}, intervals, undetermined, answer}; null if there is none. */
const scalingFit = () => DATA.sweeps.map((sweep) => sweep.scaling).find((scaling) => scaling?.law) ?? null;

/** Training FLOPs: 6 N D, as in the scaling law, if one is fitted, otherwise those of the model's configuration. */
const compute = (run) => tokensOf(run) * (scalingFit() ? 6 * run.parameters : run.flops);

/** Runs with a value, with their size N, tokens D and FLOPs C. */
function measured(runs) {
  return comparable(runs)
    .filter((run) => run.parameters)
    .map((run) => ({ run, N: run.parameters, D: tokensOf(run), C: compute(run), loss: valueOf(run) }));
}

function renderScaling() {
  const all = measured(DATA.runs);
  const sizes = distinct(all.map((one) => one.N)).sort((a, b) => a - b);
  const lengths = distinct(all.map((one) => one.D));
  const fit = scalingFit();
  byId("scaling-section").hidden = !(all.length && (fit || (sizes.length > 1 && lengths.length > 1)));
  if (byId("scaling-section").hidden) return;
  const shown = measured(shownRuns());
  const drawn = sizes.flatMap((size, i) => {
    const own = onScale(sizes.length > 1 ? i / (sizes.length - 1) : 0.5);
    const runs = shown.filter((one) => one.N === size).sort((a, b) => a.C - b.C);
    const name = `${compact(size)} parameters`;
    const points = {
      type: "scatter",
      mode: "markers",
      name,
      meta: { kind: "runs", size },
      x: runs.map((one) => one.C),
      y: runs.map((one) => one.loss),
      marker: { color: own, size: 9 },
      text: runs.map((one) => `${plain(one.run.name)}<br>${compact(one.D)} tokens`),
      hovertemplate: "<b>%{fullData.name}</b><br>%{text}<br>%{x:.3e} FLOPs, %{y:.4f}<extra></extra>",
    };
    return fit && runs.length ? [points, fitted(fit.law, runs, own, name)] : [points];
  });
  if (fit && shown.length && hasOptimum(fit)) drawn.push(frontier(fit.law, shown));
  const layout = {
    xaxis: {
      type: "log",
      title: { text: fit ? "training FLOPs, 6 N D" : "training FLOPs" },
      exponentformat: "power",
      dtick: "D2",
    },
    yaxis: { title: { text: plain(DATA.metric) } },
    ...legendBelow("scaling", sizes.length, 400),
  };
  draw("scaling", drawn, layout, "scaling");
  byId("scaling").setAttribute("aria-label", `Lowest ${DATA.metric} against training FLOPs for ${sizes.length} sizes`);
  byId("scaling-caption").textContent = scalingCaption(fit);
}

/** Whether the runs determine the coefficients that the optimum depends on: all but E. */
const hasOptimum = (fit) => (fit.undetermined ?? []).every((name) => name === "E");

function scalingCaption(fit) {
  const caption = "One marker per run: its lowest loss over its training FLOPs. One color per number of parameters.";
  if (!fit) return `${caption} No scaling law was fitted.`;
  const numbers = Object.entries(fit.law).map(([name, number]) => {
    const interval = fit.intervals[name]?.map((end) => value(+end.toPrecision(3))).join(" to ");
    const estimate = fit.undetermined?.includes(name) ? "not determined" : value(+number.toPrecision(4));
    return `${name} = ${estimate}${interval ? ` (${interval})` : ""}`;
  });
  return (
    `${caption} Lines: L = E + A / N^α + B / D^β (Hoffmann et al. 2022, equation 2), fitted: ${numbers.join(", ")}. ` +
    `${hasOptimum(fit) ? "Dashed: the lowest loss of this law for each number of FLOPs. " : ""}${fit.answer}`
  );
}

/** 40 values from low to high, evenly spaced in the logarithm. */
const spaced = (low, high) => Array.from({ length: 40 }, (_, i) => low * (high / low) ** (i / 39));

function fitted({ E, A, B, alpha, beta }, runs, own, name) {
  const tokens = spaced(Math.min(...runs.map((one) => one.D)) / 1.5, Math.max(...runs.map((one) => one.D)) * 1.5);
  const y = tokens.map((D) => E + A / runs[0].N ** alpha + B / D ** beta);
  return {
    type: "scatter",
    mode: "lines",
    name: `${name}, fitted`,
    meta: { kind: "fit", size: runs[0].N },
    x: tokens.map((D) => 6 * runs[0].N * D),
    y,
    line: { color: own, width: 1.5 },
    showlegend: false,
    hoverinfo: "skip",
  };
}

/** The lowest loss for C: N = G (C/6)^a, a = β/(α+β), G = (αA / βB)^(1/(α+β)) (Hoffmann et al. 2022, equation 4). */
function frontier({ E, A, B, alpha, beta }, shown) {
  const budgets = spaced(Math.min(...shown.map((one) => one.C)) / 2, Math.max(...shown.map((one) => one.C)) * 2);
  const G = ((alpha * A) / (beta * B)) ** (1 / (alpha + beta));
  const y = budgets.map((C) => {
    const N = G * (C / 6) ** (beta / (alpha + beta));
    return E + A / N ** alpha + B / (C / 6 / N) ** beta;
  });
  return {
    type: "scatter",
    mode: "lines",
    name: "compute-optimal",
    meta: { kind: "frontier" },
    x: budgets,
    y,
    line: { color: color("text"), width: 1.5, dash: "dash" },
    hoverinfo: "skip",
  };
}
