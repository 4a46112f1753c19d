/* In what runs differ: their configurations, their environments. */

/** The run that the others are marked against: the one that was chosen, else the best, else the first. */
function reference(runs) {
  const chosen = runs.find((run) => String(run.id) === CHOSEN.reference);
  const valued = runs.filter((run) => valueOf(run) !== null);
  return chosen ?? (valued.length ? valued.reduce((a, b) => (valueOf(b) < valueOf(a) ? b : a)) : runs[0]);
}

function renderReference(runs) {
  byId("config-controls").hidden = !DATA.keys.length;
  const options = () => [
    make("option", { value: "" }, `the lowest ${DATA.metric}`),
    ...runs.map((run) => make("option", { value: run.id }, called(run))),
  ];
  fill(byId("reference"), runs.map(called), options);
  if (!runs.some((run) => String(run.id) === CHOSEN.reference)) CHOSEN.reference = "";
  byId("reference").value = CHOSEN.reference;
}

function renderConfig() {
  const runs = filteredRuns();
  renderReference(runs);
  const beside = reference(runs);
  const alone = DATA.runs.length > 1 ? "All runs have the same configuration." : "";
  byId("config-caption").textContent = DATA.keys.length
    ? `The settings in which runs differ${beside ? `; marked is what is not as in ★ ${beside.name}` : ""}.`
    : alone;
  fill(byId("config"), [runs.map((run) => [run.name, run.settings]), DATA.keys, beside?.id], () =>
    DATA.keys.length && beside ? differences(runs, beside) : [],
  );
  renderCommon();
}

/** The table of the settings in which runs differ. */
function differences(runs, beside) {
  const head = ["run", ...DATA.keys].map((key) => make("th", { scope: "col" }, key));
  const isOther = (run, key) => JSON.stringify(run.settings[key]) !== JSON.stringify(beside.settings[key]);
  const told = (run, key) => (key in run.settings ? value(run.settings[key]) : "–");
  const rows = runs.map((run) => {
    const name = make("th", { scope: "row" }, run === beside ? `★ ${run.name}` : run.name);
    const cells = DATA.keys.map((key) => make("td", { class: isOther(run, key) ? "diff" : "" }, told(run, key)));
    return make("tr", {}, name, ...cells);
  });
  return [make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows)];
}

function renderCommon() {
  const common = Object.entries(DATA.common);
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
