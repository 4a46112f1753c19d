/* Title, summary, and the answers of sweeps. */

function renderHeader() {
  const names = DATA.sweeps.map((sweep) => sweep.name);
  const runs = DATA.runs;
  const one = runs.length === 1 ? runs[0].name : `${plural(runs.length, "run")} of ${DATA.where}`;
  const title = names.length === 1 ? names[0] : one;
  byId("title").textContent = title;
  document.title = `${title} · gptlab report`;
  const times = runs.flatMap((run) => [run.state?.began, run.state?.updated].filter(Boolean)).sort((a, b) => a - b);
  const day = (seconds) =>
    new Date(seconds * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
  const [from, to] = times.length ? [day(times[0]), day(times.at(-1))] : ["", ""];
  const when = from && (from === to ? `${from}. ` : `${from} to ${to}. `);
  byId("subtitle").textContent = `${when}Written ${day(Date.parse(DATA.made) / 1000)}.`;
  const finished = runs.filter((run) => stateOf(run) === "done").length;
  const best = bestRun(runs);
  const none = runs.some((run) => valueOf(run) !== null) ? "no run to compare" : "no evaluation yet";
  const tokens = runs.map(tokensOf);
  const seconds = runs.map((run) => run.state?.seconds ?? 0).reduce((a, b) => a + b, 0);
  const tiles = [
    ["runs", count(runs.length), `${finished} done`],
    [`${extreme()} ${DATA.metric}`, best ? fixed(valueOf(best)) : "–", best ? DATA.points[best.point] : none],
    ["tokens seen", compact(tokens.reduce((a, b) => a + b, 0)), "sum of all runs"],
    ["wall time", clock(seconds), "sum of all runs"],
  ];
  fill(byId("tiles"), tiles, () =>
    tiles.map(([name, large, small]) =>
      make("div", { class: "tile" }, make("span", {}, name), make("strong", {}, large), make("small", {}, small)),
    ),
  );
  fill(byId("problems"), DATA.problems, () =>
    DATA.problems.length
      ? [make("ul", { class: "note", role: "alert" }, ...DATA.problems.map((problem) => make("li", {}, problem)))]
      : [],
  );
}

function renderAnswers() {
  fill(byId("answers"), DATA.sweeps, () =>
    DATA.sweeps.map((sweep) => {
      const parts = [make("h2", {}, sweep.question || sweep.name)];
      if (sweep.answers?.answer) parts.push(make("p", { class: "answer" }, sweep.answers.answer));
      if (sweep.answers?.rows.length) parts.push(answersTable(sweep.answers));
      for (const note of sweep.answers?.notes ?? []) parts.push(make("p", { class: "hint" }, note));
      const space = Object.entries(sweep.space).map((pair) => pair.join("="));
      parts.push(
        make(
          "p",
          { class: "hint" },
          `${sweep.name}: ${plural(sweep.trials, "trial")}, ${sweep.search} search over `,
          make("code", {}, space.join(" ")),
        ),
      );
      if (!sweep.answers) parts.push(make("p", { class: "hint" }, "No results yet."));
      return make("section", {}, ...parts);
    }),
  );
}

function answersTable({ columns, rows }) {
  const isAlways = (i, test) => rows.every((row) => row[i] === null || test(row[i]));
  const kinds = columns.map((_, i) => {
    if (isAlways(i, (each) => isNumber(each) || /^[+-]?[\d.]+( ± [\d.]+)?$/.test(each))) return "number";
    return isAlways(i, (each) => String(each).length < 20) ? "" : "words";
  });
  const head = columns.map((column, i) => make("th", { scope: "col", class: kinds[i] }, column));
  const cells = (row) => row.map((each, i) => make("td", { class: kinds[i] }, value(each)));
  const body = rows.map((row) => make("tr", {}, ...cells(row)));
  return make(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table of results" },
    make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...body)),
  );
}
