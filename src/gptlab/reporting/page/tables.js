/* Differences between the configurations and environments of runs. */

/** The run that the others are compared with: the selected one, otherwise the best, otherwise the first. */
function referenceRun(runs) {
  const chosen = runs.find((run) => String(run.id) === CHOSEN.reference);
  return chosen ?? bestRun(runs) ?? runs[0];
}

function renderReference(runs) {
  byId("config-controls").hidden = !DATA.keys.length;
  const options = () => [
    make("option", { value: "" }, `the ${extreme()} ${DATA.metric}`),
    ...runs.map((run) => make("option", { value: run.id }, titleOf(run))),
  ];
  fill(byId("reference"), runs.map(titleOf), options);
  if (!runs.some((run) => String(run.id) === CHOSEN.reference)) CHOSEN.reference = "";
  byId("reference").value = CHOSEN.reference;
}

function renderConfig() {
  const runs = filteredRuns();
  renderReference(runs);
  const reference = referenceRun(runs);
  const same = DATA.runs.length > 1 ? "All runs have the same configuration." : "";
  byId("config-caption").textContent = DATA.keys.length
    ? `Config keys whose values differ between runs.${reference ? ` Highlighted: values that differ from ★ ${reference.name}.` : ""}`
    : same;
  fill(byId("config"), [runs.map((run) => [run.name, run.settings]), DATA.keys, reference?.id], () =>
    DATA.keys.length && reference ? differences(runs, reference) : [],
  );
  renderCommon();
}

/** Table of the config keys whose values differ between runs. */
function differences(runs, reference) {
  const head = ["run", ...DATA.keys].map((key) => make("th", { scope: "col" }, key));
  const isOther = (run, key) => JSON.stringify(run.settings[key]) !== JSON.stringify(reference.settings[key]);
  const text = (run, key) => (key in run.settings ? value(run.settings[key]) : "–");
  const rows = runs.map((run) => {
    const name = make("th", { scope: "row" }, run === reference ? `★ ${run.name}` : run.name);
    const cells = DATA.keys.map((key) => make("td", { class: isOther(run, key) ? "diff" : "" }, text(run, key)));
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
    `${plural(common.length, "config key")}${DATA.runs.length > 1 ? " with the same value in all runs" : ""}`;
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
    GPUs: machine.gpus?.join("; ") || "none found",
    python: environment.python,
    "git commit": environment.git?.commit ?? "not a checkout",
    uncommitted: uncommitted.length ? `${plural(uncommitted.length, "file")}: ${uncommitted.join(", ")}` : "no changes",
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
