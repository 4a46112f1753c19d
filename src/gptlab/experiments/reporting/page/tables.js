/* Header, answers, and the tables: runs, configurations, environments. */

const SIGNS = { done: "✓", running: "▶", pruned: "✂", failed: "✕", diverged: "✕", mistaken: "✕", lost: "?", unknown: "?" };

function table(id, columns, rows) {
  const head = make("tr", {}, ...columns.map((column) => make("th", { scope: "col", class: column.kind }, ...column.head)));
  byId(id).replaceChildren(make("thead", {}, head), make("tbody", {}, ...rows));
}

function renderHeader() {
  const names = DATA.sweeps.map((sweep) => sweep.name);
  const runs = DATA.runs;
  const one = runs.length === 1 ? runs[0].name : `${plural(runs.length, "run")} of ${DATA.where}`;
  const title = names.length === 1 ? names[0] : one;
  byId("title").textContent = title;
  document.title = `${title} · gptlab report`;
  const times = runs.flatMap((run) => [run.state?.began, run.state?.updated].filter(Boolean)).sort((a, b) => a - b);
  const day = (seconds) => new Date(seconds * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
  const when = times.length ? `${day(times[0])} to ${day(times.at(-1))}. ` : "";
  byId("subtitle").textContent = `${when}Written ${day(Date.parse(DATA.made) / 1000)}.`;
  const finished = runs.filter((run) => stateOf(run) === "done").length;
  const valued = runs.filter((run) => valueOf(run) !== null);
  const best = valued.length ? valued.reduce((a, b) => (valueOf(b) < valueOf(a) ? b : a)) : null;
  const tokens = runs.map((run) => run.state?.tokens || Math.max(0, ...Object.values(run.series).map((curve) => curve.tokens.at(-1) ?? 0)));
  const seconds = runs.map((run) => run.state?.seconds ?? 0).reduce((a, b) => a + b, 0);
  const tiles = [
    ["runs", count(runs.length), `${finished} done`],
    [`lowest ${DATA.metric}`, best ? fixed(valueOf(best)) : "–", best ? DATA.points[best.point] : "none yet"],
    ["tokens seen", compact(tokens.reduce((a, b) => a + b, 0)), "of all runs"],
    ["time", clock(seconds), "of all runs, one after another"],
  ];
  fill(byId("tiles"), tiles, () => tiles.map(([name, large, small]) => make("div", { class: "tile" }, make("span", {}, name), make("strong", {}, large), make("small", {}, small))));
  fill(byId("problems"), DATA.problems, () => (DATA.problems.length ? [make("ul", { class: "note", role: "alert" }, ...DATA.problems.map((told) => make("li", {}, told)))] : []));
}

function renderAnswers() {
  fill(byId("answers"), DATA.sweeps, () =>
    DATA.sweeps.map((sweep) => {
      const parts = [make("h2", {}, sweep.question || sweep.name)];
      if (sweep.answers?.answer) parts.push(make("p", { class: "answer" }, sweep.answers.answer));
      if (sweep.answers?.rows.length) parts.push(answersTable(sweep.answers));
      for (const note of sweep.answers?.notes ?? []) parts.push(make("p", { class: "hint" }, note));
      const space = Object.entries(sweep.space).map((pair) => pair.join("="));
      parts.push(make("p", { class: "hint" }, `${sweep.name}: ${plural(sweep.trials, "trial")}, search by ${sweep.search}, of `, make("code", {}, space.join(" "))));
      if (!sweep.answers) parts.push(make("p", { class: "hint" }, "No table of answers stands beside it yet."));
      return make("section", {}, ...parts);
    }),
  );
}

function answersTable({ columns, rows }) {
  const numeric = columns.map((_, i) => rows.every((row) => row[i] === null || isNumber(row[i])));
  const head = columns.map((column, i) => make("th", { scope: "col", class: numeric[i] ? "number" : "" }, column));
  const cells = (row) => row.map((each, i) => make("td", { class: numeric[i] ? "number" : "" }, value(each)));
  const body = rows.map((row) => make("tr", {}, ...cells(row)));
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table of answers" }, make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...body)));
}

/** What a forecast came to, if it was scored. */
function forecastScore(run) {
  const score = run.forecast?.score;
  if (score === undefined || score === null) return null;
  if (typeof score !== "object") return value(score);
  return Object.entries(score).filter(([, own]) => typeof own !== "object").map(([name, own]) => `${name} ${value(own)}`).join(", ");
}

const RUN_COLUMNS = {
  run: { of: (run) => run.name, kind: "" },
  state: { of: stateOf, kind: "", shown: (run) => [make("span", { class: `state ${stateOf(run)}`, title: run.state?.message ?? "" }, `${SIGNS[stateOf(run)] ?? "■"} ${stateOf(run)}`)] },
  step: { of: (run) => run.state?.step ?? lastOf(run, "train/loss", "step"), kind: "number", shown: (run) => [`${count(RUN_COLUMNS.step.of(run))}${run.state?.max_steps ? `/${count(run.state.max_steps)}` : ""}`] },
  tokens: { of: (run) => run.state?.tokens ?? lastOf(run, "train/loss", "tokens"), kind: "number", shown: (run) => [compact(RUN_COLUMNS.tokens.of(run))] },
  parameters: { of: (run) => run.parameters, kind: "number", shown: (run) => [compact(run.parameters)] },
  "train loss": { of: (run) => lastOf(run, "train/loss", "value"), kind: "number", shown: (run) => [fixed(lastOf(run, "train/loss", "value"))] },
  best: { of: valueOf, kind: "number", shown: (run) => [run.best ? make("strong", {}, fixed(valueOf(run))) : "–"] },
  "at step": { of: (run) => run.best?.step ?? null, kind: "number", shown: (run) => [count(run.best?.step)] },
  "tokens/s": { of: (run) => lastOf(run, "tokens_per_second", "value"), kind: "number", shown: (run) => [count(lastOf(run, "tokens_per_second", "value"))] },
  time: { of: (run) => run.state?.seconds ?? null, kind: "number", shown: (run) => [clock(run.state?.seconds)] },
  left: { of: (run) => run.state?.seconds_left ?? null, kind: "number", shown: (run) => [clock(run.state?.seconds_left)] },
  forecast: { of: forecastScore, kind: "", shown: (run) => [forecastScore(run) ?? "–"] },
};

function lastOf(run, metric, what) {
  return run.series[metric]?.[what].at(-1) ?? null;
}

function sortBy(name) {
  CHOSEN.sort = CHOSEN.sort.column !== name ? { column: name, up: true } : CHOSEN.sort.up ? { column: name, up: false } : { column: null, up: true };
  render();
}

function sorted(runs) {
  const column = RUN_COLUMNS[CHOSEN.sort.column];
  if (!column) return runs;
  const filled = runs.filter((run) => column.of(run) !== null);
  filled.sort((a, b) => ((column.of(a) > column.of(b)) - (column.of(a) < column.of(b))) * (CHOSEN.sort.up ? 1 : -1));
  return [...filled, ...runs.filter((run) => column.of(run) === null)]; // what is missing stands last, either way
}

function renderRuns() {
  const runs = filteredRuns();
  const wanted = Object.entries(RUN_COLUMNS).filter(([name, column]) => name === "run" || name === "state" || DATA.runs.some((run) => column.of(run) !== null));
  const columns = wanted.map(([name, column]) => {
    const up = CHOSEN.sort.column === name ? CHOSEN.sort.up : null;
    const label = name === "best" ? `lowest ${DATA.metric}` : name;
    return { kind: column.kind, head: [make("button", { type: "button", "data-sort": name, onclick: () => sortBy(name) }, label, up === null ? null : up ? " ▲" : " ▼")] };
  });
  const rows = sorted(runs).map((run) => {
    const dot = make("span", { class: "dot" });
    dot.style.background = look(run.point).colour;
    const first = make("th", { scope: "row", title: run.directory }, dot, run.name);
    return make("tr", {}, first, ...wanted.slice(1).map(([, column]) => make("td", { class: column.kind }, ...column.shown(run))));
  });
  const focused = document.activeElement?.dataset?.sort;
  table("runs", columns, rows);
  if (focused) byId("runs").querySelector(`[data-sort="${focused}"]`)?.focus();
  const missing = DATA.sweeps.flatMap((sweep) => sweep.without_run.map((trial) => ({ sweep, trial })));
  fill(byId("without-run"), [missing], () => (missing.length ? [make("p", { class: "hint" }, "Trials without a run:"), make("ul", {}, ...missing.map(({ sweep, trial }) => make("li", {}, `${sweep.name}/${trial.number}: ${trial.state}${trial.message ? `, ${trial.message}` : ""} (${Object.entries(trial.overrides).map((pair) => pair.join("=")).join(" ")})`)))] : []));
}

/** The value that most runs have. */
function usual(key) {
  const found = new Map();
  for (const run of DATA.runs) {
    const own = JSON.stringify(run.settings[key] ?? null);
    found.set(own, (found.get(own) ?? 0) + 1);
  }
  const [[own, number]] = [...found].sort((a, b) => b[1] - a[1]);
  return number > 1 ? own : null;
}

function renderConfig() {
  const runs = filteredRuns();
  byId("config-caption").textContent = DATA.keys.length
    ? "The settings in which runs differ; marked is what is not the value that most have."
    : DATA.runs.length > 1 ? "All runs have the same configuration." : "The configuration of the run:";
  const common = Object.entries(DATA.common);
  fill(byId("config"), [runs.map((run) => [run.name, run.settings]), DATA.keys], () => {
    if (!DATA.keys.length) return [];
    const most = Object.fromEntries(DATA.keys.map((key) => [key, usual(key)]));
    const head = ["run", ...DATA.keys].map((key) => make("th", { scope: "col" }, key));
    const cell = (run, key) => make("td", { class: most[key] !== null && JSON.stringify(run.settings[key] ?? null) !== most[key] ? "diff" : "" }, key in run.settings ? value(run.settings[key]) : "–");
    const rows = runs.map((run) => make("tr", {}, make("th", { scope: "row" }, run.name), ...DATA.keys.map((key) => cell(run, key))));
    return [make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows)];
  });
  fill(byId("common-table"), common, () => [make("tbody", {}, ...common.map(([key, own]) => make("tr", {}, make("th", { scope: "row" }, key), make("td", {}, own === null ? "null" : value(own)))))]);
  byId("common").querySelector("summary").textContent = `${plural(common.length, "setting")}${DATA.runs.length > 1 ? " that all runs share" : ""}`;
}

function renderEnvironment() {
  const runs = filteredRuns();
  const shown = distinct(runs.map((run) => run.environment));
  fill(byId("environment"), [shown, DATA.environments, runs.map((run) => run.name)], () => shown.map((place) => environmentCard(DATA.environments[place], runs.filter((run) => run.environment === place))));
}

function environmentCard(environment, runs) {
  const machine = environment.machine ?? {};
  const uncommitted = environment.git?.uncommitted ?? [];
  const facts = {
    machine: machine.host, system: machine.system, processor: machine.processor && `${machine.processor}, ${machine.cores} cores`,
    memory: machine.memory_bytes && `${(machine.memory_bytes / 2 ** 30).toFixed(1)} GiB`, GPUs: machine.gpus?.join("; ") || "none seen",
    python: environment.python, "git commit": environment.git?.commit ?? "no checkout",
    uncommitted: uncommitted.length ? `${plural(uncommitted.length, "file")}: ${uncommitted.join(", ")}` : "nothing",
  };
  if (!environment.machine) return make("div", { class: "card" }, make("h3", {}, names(runs)), make("p", {}, "No environment was recorded."));
  const list = Object.entries(facts).filter(([, own]) => own).flatMap(([name, own]) => [make("dt", {}, name), make("dd", name === "uncommitted" && uncommitted.length ? { class: "diff" } : {}, own)]);
  const packages = Object.entries(environment.packages ?? {});
  const others = DATA.environments.map((other) => other.packages ?? {});
  const rows = packages.map(([name, version]) => make("tr", {}, make("th", { scope: "row" }, name), make("td", { class: others.some((other) => other[name] !== version) ? "diff" : "" }, String(version))));
  const commands = runs.filter((run) => run.start?.command).map((run) => make("li", {}, make("code", {}, run.start.command), ` ${run.start.time ?? ""}`));
  return make(
    "div", { class: "card" }, make("h3", {}, names(runs)), make("dl", {}, ...list),
    make("details", {}, make("summary", {}, plural(packages.length, "package")), make("div", { class: "scroll" }, make("table", {}, make("tbody", {}, ...rows)))),
    make("details", {}, make("summary", {}, plural(commands.length, "command")), make("ul", {}, ...commands)),
  );
}

const names = (runs) => (runs.length > 3 ? `${runs.slice(0, 2).map((run) => run.name).join(", ")} and ${runs.length - 2} more` : runs.map((run) => run.name).join(", "));
