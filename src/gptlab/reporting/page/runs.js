/* Table of runs. */

const SIGNS = {
  done: "✓",
  running: "▶",
  pruned: "✂",
  failed: "✕",
  diverged: "✕",
  config_error: "✕",
  lost: "?",
  unknown: "?",
};

/** State of a run in words. */
const stateLabel = (run) => (blewUp(run) ? "done, blew up" : stateOf(run));

function table(id, columns, rows) {
  const head = make(
    "tr",
    {},
    ...columns.map((column) => make("th", { scope: "col", class: column.kind }, ...column.head)),
  );
  byId(id).replaceChildren(make("thead", {}, head), make("tbody", {}, ...rows));
}

/** Ratios of measured to forecast values, if the forecast was scored. */
function forecastScore(run) {
  const score = run.forecast?.score;
  if (score === undefined || score === null) return null;
  if (typeof score !== "object") return value(score);
  const names = { peak_memory_bytes: "memory", seconds: "time" };
  const ratios = Object.entries(score).map(([name, own]) => [names[name] ?? name, isNumber(own) ? own : own?.ratio]);
  const formatted = ratios.filter(([, ratio]) => isNumber(ratio)).map(([name, ratio]) => `${name} ×${+ratio.toFixed(3)}`);
  return formatted.join(", ") || null;
}

const RUN_COLUMNS = {
  run: { of: (run) => run.name, kind: "" },
  state: {
    of: stateOf,
    kind: "",
    shown: (run) => [
      make(
        "span",
        { class: `state ${blewUp(run) ? "failed" : stateOf(run)}`, title: run.state?.message ?? run.blew_up ?? "" },
        `${SIGNS[stateOf(run)] ?? "■"} ${stateLabel(run)}`,
      ),
    ],
  },
  step: {
    of: (run) => run.state?.step ?? lastOf(run, "train/loss", "step"),
    kind: "number",
    shown: (run) => [
      `${count(RUN_COLUMNS.step.of(run))}${run.state?.max_steps ? `/${count(run.state.max_steps)}` : ""}`,
    ],
  },
  tokens: {
    of: tokensOf,
    kind: "number",
    shown: (run) => [compact(tokensOf(run))],
  },
  parameters: { of: (run) => run.parameters, kind: "number", shown: (run) => [compact(run.parameters)] },
  "train loss": {
    of: (run) => lastOf(run, "train/loss", "value"),
    kind: "number",
    shown: (run) => [fixed(lastOf(run, "train/loss", "value"))],
  },
  best: { of: valueOf, kind: "number", shown: (run) => [run.best ? make("strong", {}, fixed(valueOf(run))) : "–"] },
  "at step": { of: (run) => run.best?.step ?? null, kind: "number", shown: (run) => [count(run.best?.step)] },
  "tokens/s": {
    of: (run) => lastOf(run, "tokens_per_second", "value"),
    kind: "number",
    shown: (run) => [count(lastOf(run, "tokens_per_second", "value"))],
  },
  time: { of: (run) => run.state?.seconds ?? null, kind: "number", shown: (run) => [clock(run.state?.seconds)] },
  left: {
    of: (run) => run.state?.seconds_left ?? null,
    kind: "number",
    shown: (run) => [clock(run.state?.seconds_left)],
  },
  forecast: { of: forecastScore, kind: "score", shown: (run) => [forecastScore(run) ?? "–"] },
};

const MOST_VARIED = 8; // columns of varied config keys; the table of configurations has all

/** Columns of the table by name: those of the varied config keys follow the state. */
function runColumns() {
  const { run, state, ...others } = RUN_COLUMNS;
  const varied = variedKeys().slice(0, MOST_VARIED).map((key) => {
    const of = (run) => run.varied[key] ?? null;
    return [key, { of, kind: "number", label: shortest(key), shown: (run) => [value(of(run))] }];
  });
  return { run, state, ...Object.fromEntries(varied), ...others };
}

/** Last part of a varied key, or the whole key if another varied key has the same last part. */
const shortest = (key) => (variedKeys().filter((other) => short(other) === short(key)).length > 1 ? key : short(key));

function lastOf(run, metric, what) {
  return run.series[metric]?.[what].at(-1) ?? null;
}

function sortBy(name) {
  CHOSEN.sort =
    CHOSEN.sort.column !== name
      ? { column: name, up: true }
      : CHOSEN.sort.up
        ? { column: name, up: false }
        : { column: null, up: true };
  render();
}

function sorted(runs) {
  const column = runColumns()[CHOSEN.sort.column];
  if (!column) return runs;
  const filled = runs.filter((run) => column.of(run) !== null);
  filled.sort((a, b) => ((column.of(a) > column.of(b)) - (column.of(a) < column.of(b))) * (CHOSEN.sort.up ? 1 : -1));
  return [...filled, ...runs.filter((run) => column.of(run) === null)]; // runs without a value come last in either order
}

function renderRuns() {
  const runs = filteredRuns();
  const wanted = Object.entries(runColumns()).filter(
    ([name, column]) => name === "run" || name === "state" || DATA.runs.some((run) => column.of(run) !== null),
  );
  const columns = wanted.map(([name, column]) => {
    const up = CHOSEN.sort.column === name ? CHOSEN.sort.up : null;
    const label = name === "best" ? `${extreme()} ${DATA.metric}` : (column.label ?? name);
    return {
      kind: column.kind,
      head: [
        make(
          "button",
          { type: "button", "data-sort": name, title: name, onclick: () => sortBy(name) },
          label,
          up === null ? null : up ? " ▲" : " ▼",
        ),
      ],
    };
  });
  const rows = sorted(runs).map((run) => {
    const dot = make("span", { class: "dot" });
    dot.style.background = look(run.point).color;
    const first = make("th", { scope: "row", title: run.directory }, dot, run.name);
    return make(
      "tr",
      {},
      first,
      ...wanted.slice(1).map(([, column]) => make("td", { class: column.kind }, ...column.shown(run))),
    );
  });
  const focused = document.activeElement?.dataset?.sort;
  table("runs", columns, rows);
  if (focused) byId("runs").querySelector(`[data-sort="${focused}"]`)?.focus();
  renderWithoutRun();
}

/** Trials without a run directory. */
function renderWithoutRun() {
  const missing = DATA.sweeps.flatMap((sweep) => sweep.without_run.map((trial) => ({ ...trial, sweep: sweep.name })));
  const item = ({ sweep, number, state, message, overrides }) => {
    const settings = Object.entries(overrides).map((pair) => pair.join("="));
    return make("li", {}, `${sweep}/${number}: ${state}${message ? `, ${message}` : ""} (${settings.join(" ")})`);
  };
  fill(byId("without-run"), missing, () =>
    missing.length ? [make("p", { class: "hint" }, "Trials without a run:"), make("ul", {}, ...missing.map(item))] : [],
  );
}
