/* Loss against compute, where runs differ in size and tokens: what was measured, and the fit if one was made. */

/** Runs with a value, their size N, tokens D and FLOPs C. */
function measured(runs) {
  return runs
    .filter((run) => valueOf(run) !== null && run.parameters && run.flops && !NO_SEEDS.includes(stateOf(run)))
    .map((run) => ({ run, N: run.parameters, D: run.best.tokens, C: run.best.tokens * run.flops, loss: valueOf(run) }));
}

const theFit = () => DATA.sweeps.map((sweep) => sweep.scaling).find(Boolean) ?? null;

function renderScaling() {
  const all = measured(DATA.runs);
  const sizes = distinct(all.map((one) => one.N)).sort((a, b) => a - b);
  const lengths = distinct(all.map((one) => one.D));
  const fit = theFit();
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
    const curve = coefficients(fit) && runs.length ? fitted(fit, runs, own, name) : [];
    return [points, ...curve];
  });
  if (coefficients(fit)) drawn.push(...frontier(fit, shown));
  const layout = {
    xaxis: { type: "log", title: { text: "training FLOPs" }, exponentformat: "power" },
    yaxis: { title: { text: plain(DATA.metric) } },
  };
  draw("scaling", drawn, layout, "scaling");
  byId("scaling").setAttribute("aria-label", `Lowest ${DATA.metric} against training FLOPs for ${sizes.length} sizes`);
  const told = ["One point a run: its lowest loss, and the FLOPs up to there. A colour for each number of parameters."];
  const found = coefficients(fit);
  told.push(
    found
      ? `Lines: L = E + A / N^α + B / D^β (Hoffmann et al. 2022, approach 3) with ${Object.entries(found)
          .map(([name, number]) => `${name} = ${value(+number.toPrecision(4))}`)
          .join(", ")}. Dashed: the lowest loss that this form has for the FLOPs, at C = 6 N D.`
      : "No fit was made of them.",
  );
  byId("scaling-caption").textContent = told.join(" ");
}

/** E, A, B, alpha and beta of a fit; null where it does not name them all. */
function coefficients(fit) {
  const from = fit?.coefficients ?? fit?.fit ?? fit;
  if (!from) return null;
  const number = (name) => [from[name], from[name]?.value, from[name]?.estimate].find(isNumber);
  const found = { E: number("E"), A: number("A"), B: number("B"), alpha: number("alpha"), beta: number("beta") };
  return Object.values(found).every(isNumber) ? found : null;
}

/** 40 places from low to high, evenly in the logarithm. */
const spaced = (low, high) => Array.from({ length: 40 }, (_, i) => low * (high / low) ** (i / 39));

function fitted(fit, runs, own, name) {
  const { E, A, B, alpha, beta } = coefficients(fit);
  const tokens = spaced(Math.min(...runs.map((one) => one.D)) / 1.5, Math.max(...runs.map((one) => one.D)) * 1.5);
  const y = tokens.map((D) => E + A / runs[0].N ** alpha + B / D ** beta);
  return [
    {
      type: "scatter",
      mode: "lines",
      name: `${name}, fitted`,
      meta: { kind: "fit", size: runs[0].N },
      x: tokens.map((D) => D * runs[0].run.flops),
      y,
      line: { color: own, width: 1.5 },
      hoverinfo: "skip",
    },
  ];
}

/** The lowest loss for the compute: N = G (C/6)^a with a = β/(α+β), G = (αA / βB)^(1/(α+β)) (Hoffmann et al. 2022, equation 4). */
function frontier(fit, shown) {
  if (!shown.length) return [];
  const { E, A, B, alpha, beta } = coefficients(fit);
  const compute = spaced(Math.min(...shown.map((one) => one.C)) / 2, Math.max(...shown.map((one) => one.C)) * 2);
  const G = ((alpha * A) / (beta * B)) ** (1 / (alpha + beta));
  const y = compute.map((C) => {
    const N = G * (C / 6) ** (beta / (alpha + beta));
    return E + A / N ** alpha + B / (C / 6 / N) ** beta;
  });
  return [
    {
      type: "scatter",
      mode: "lines",
      name: "lowest for the compute",
      meta: { kind: "frontier" },
      x: compute,
      y,
      line: { color: colour("text"), width: 1.5, dash: "dash" },
      hoverinfo: "skip",
    },
  ];
}
