/* In what runs differ: their configurations, their environments. */

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
    : DATA.runs.length > 1
      ? "All runs have the same configuration."
      : "The configuration of the run:";
  const common = Object.entries(DATA.common);
  fill(byId("config"), [runs.map((run) => [run.name, run.settings]), DATA.keys], () => {
    if (!DATA.keys.length) return [];
    const most = Object.fromEntries(DATA.keys.map((key) => [key, usual(key)]));
    const head = ["run", ...DATA.keys].map((key) => make("th", { scope: "col" }, key));
    const cell = (run, key) =>
      make(
        "td",
        { class: most[key] !== null && JSON.stringify(run.settings[key] ?? null) !== most[key] ? "diff" : "" },
        key in run.settings ? value(run.settings[key]) : "–",
      );
    const rows = runs.map((run) =>
      make("tr", {}, make("th", { scope: "row" }, run.name), ...DATA.keys.map((key) => cell(run, key))),
    );
    return [make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows)];
  });
  fill(byId("common-table"), common, () => [
    make(
      "tbody",
      {},
      ...common.map(([key, own]) =>
        make("tr", {}, make("th", { scope: "row" }, key), make("td", {}, own === null ? "null" : value(own))),
      ),
    ),
  ]);
  byId("common").querySelector("summary").textContent =
    `${plural(common.length, "setting")}${DATA.runs.length > 1 ? " that all runs share" : ""}`;
}

function renderEnvironment() {
  const runs = filteredRuns();
  const shown = distinct(runs.map((run) => run.environment));
  fill(byId("environment"), [shown, DATA.environments, runs.map((run) => run.name)], () =>
    shown.map((place) =>
      environmentCard(
        DATA.environments[place],
        runs.filter((run) => run.environment === place),
      ),
    ),
  );
}

function environmentCard(environment, runs) {
  const machine = environment.machine ?? {};
  const uncommitted = environment.git?.uncommitted ?? [];
  const facts = {
    machine: machine.host,
    system: machine.system,
    processor: machine.processor && `${machine.processor}, ${machine.cores} cores`,
    memory: machine.memory_bytes && `${(machine.memory_bytes / 2 ** 30).toFixed(1)} GiB`,
    GPUs: machine.gpus?.join("; ") || "none seen",
    python: environment.python,
    "git commit": environment.git?.commit ?? "no checkout",
    uncommitted: uncommitted.length ? `${plural(uncommitted.length, "file")}: ${uncommitted.join(", ")}` : "nothing",
  };
  if (!environment.machine)
    return make("div", { class: "card" }, make("h3", {}, names(runs)), make("p", {}, "No environment was recorded."));
  const list = Object.entries(facts)
    .filter(([, own]) => own)
    .flatMap(([name, own]) => [
      make("dt", {}, name),
      make("dd", name === "uncommitted" && uncommitted.length ? { class: "diff" } : {}, own),
    ]);
  const packages = Object.entries(environment.packages ?? {});
  const others = DATA.environments.map((other) => other.packages ?? {});
  const rows = packages.map(([name, version]) =>
    make(
      "tr",
      {},
      make("th", { scope: "row" }, name),
      make("td", { class: others.some((other) => other[name] !== version) ? "diff" : "" }, String(version)),
    ),
  );
  const commands = runs
    .filter((run) => run.start?.command)
    .map((run) => make("li", {}, make("code", {}, run.start.command), ` ${run.start.time ?? ""}`));
  return make(
    "div",
    { class: "card" },
    make("h3", {}, names(runs)),
    make("dl", {}, ...list),
    make(
      "details",
      {},
      make("summary", {}, plural(packages.length, "package")),
      make("div", { class: "scroll" }, make("table", {}, make("tbody", {}, ...rows))),
    ),
    make("details", {}, make("summary", {}, plural(commands.length, "command")), make("ul", {}, ...commands)),
  );
}

const names = (runs) =>
  runs.length > 3
    ? `${runs
        .slice(0, 2)
        .map((run) => run.name)
        .join(", ")} and ${runs.length - 2} more`
    : runs.map((run) => run.name).join(", ");
