/* Filters by words, config values and states, and the legend shared by all charts. */

const MOST_CHOICES = 24; // config keys with more values get no list
const stateOf = (run) => run.state?.state ?? "unknown";
const blewUp = (run) => run.blew_up && stateOf(run) === "done";

const NO_VALUE = ["failed", "diverged", "pruned", "config_error"]; // states of runs that ended early

/** Whether a run is left out of means and of comparisons by its best value. */
const isExcluded = (run) => NO_VALUE.includes(stateOf(run)) || blewUp(run);

/** Config keys that runs can be filtered by, and the state, each with its values. */
function choices() {
  const found = [["state", distinct(DATA.runs.map(stateOf))]];
  for (const key of DATA.keys) {
    const values = distinct(DATA.runs.map((run) => run.settings[key] ?? null));
    if (values.length <= MOST_CHOICES) found.push([key, values.sort((a, b) => (a > b) - (a < b))]);
  }
  return found.filter(([key, values]) => values.length > 1 || CHOSEN.picked.has(key));
}

const picked = (run, key) => (key === "state" ? stateOf(run) : (run.settings[key] ?? null));

/** Values of all config keys of a run whose name is, or ends in, a name. */
function settingsNamed(run, name) {
  const all = { ...DATA.common, ...run.settings, ...run.varied, state: stateOf(run), parameters: run.parameters };
  return Object.entries(all)
    .filter(([key]) => key === name || key.endsWith(`.${name}`))
    .map(([, own]) => own);
}

const COMPARE = {
  "=": (own, asked) => String(own) === asked || (isNumber(own) && asked !== "" && own === Number(asked)),
  "!=": (own, asked) => !COMPARE["="](own, asked),
  "<": (own, asked) => isNumber(own) && own < Number(asked),
  ">": (own, asked) => isNumber(own) && own > Number(asked),
};

function fits(run, term) {
  const found = term.match(/^([\w.]+)(!=|=|<|>)(.*)$/);
  if (found) return settingsNamed(run, found[1]).some((own) => COMPARE[found[2]](own, found[3]));
  const words = [
    run.name,
    run.directory,
    DATA.points[run.point],
    stateOf(run),
    ...Object.entries(run.settings).map((pair) => pair.join("=")),
  ];
  return words.join("\n").toLowerCase().includes(term.toLowerCase());
}

/** Runs that pass the filters. */
function filteredRuns() {
  const terms = CHOSEN.text.split(/\s+/).filter(Boolean);
  return DATA.runs.filter(
    (run) =>
      terms.every((term) => fits(run, term)) &&
      [...CHOSEN.picked].every(([key, values]) => values.has(JSON.stringify(picked(run, key)))),
  );
}

/** Runs that pass the filters and whose point is not hidden in the legend. */
const shownRuns = () => filteredRuns().filter((run) => !CHOSEN.hidden.has(run.point));

function pick(key, values, each, on) {
  const chosen = CHOSEN.picked.get(key) ?? new Set(values.map((one) => JSON.stringify(one)));
  if (on) chosen.add(JSON.stringify(each));
  else chosen.delete(JSON.stringify(each));
  if (values.every((one) => chosen.has(JSON.stringify(one)))) CHOSEN.picked.delete(key);
  else CHOSEN.picked.set(key, chosen);
  render();
}

function renderPicks() {
  const all = choices();
  const signature = [all, [...CHOSEN.picked].map(([key, values]) => [key, [...values]])];
  fill(byId("pick-list"), signature, () =>
    all.map(([key, values]) => {
      const boxes = values.map((each) => {
        const on = CHOSEN.picked.get(key)?.has(JSON.stringify(each)) ?? true;
        const id = `${key}=${each}`;
        const box = make("input", {
          type: "checkbox",
          "data-pick": id,
          onchange: (event) => pick(key, values, each, event.target.checked),
        });
        box.checked = on;
        return make("label", {}, box, value(each));
      });
      return make("fieldset", {}, make("legend", {}, key), ...boxes);
    }),
  );
  byId("picks").classList.toggle("active", CHOSEN.picked.size > 0);
  byId("picks").hidden = all.length === 0;
}

function toggle(point) {
  if (!CHOSEN.hidden.delete(point)) CHOSEN.hidden.add(point);
  render();
}

/** Shows only one point, or all points if only this one is shown. */
function isolate(point, points) {
  const alone = points.every((other) => (other === point) !== CHOSEN.hidden.has(other));
  CHOSEN.hidden = new Set(alone ? [] : points.filter((other) => other !== point));
  render();
}

function renderLegend() {
  const points = distinct(filteredRuns().map((run) => run.point));
  const looks = points.map(look);
  fill(byId("legend"), [points, looks, DATA.points], () =>
    points.map((point, i) => {
      const swatch = make("span", { class: "swatch" });
      const drawn = { dash: "dashed", dot: "dotted", dashdot: "double" }[looks[i].dash] ?? "solid";
      swatch.style.borderTop = `3px ${drawn} ${looks[i].color}`;
      const number = DATA.runs.filter((run) => run.point === point).length;
      return make(
        "button",
        {
          type: "button",
          "data-point": point,
          title: "click: hide or show; double-click: show only this one",
          onclick: (event) => event.detail < 2 && toggle(point),
          ondblclick: () => {
            CHOSEN.hidden.delete(point);
            isolate(point, points);
          },
        },
        swatch,
        DATA.points[point],
        number > 1 ? make("small", {}, ` × ${number}`) : null,
      );
    }),
  );
  for (const button of byId("legend").children) {
    button.setAttribute("aria-pressed", String(!CHOSEN.hidden.has(Number(button.dataset.point))));
  }
}

function renderFilters() {
  renderPicks();
  renderLegend();
  byId("count").textContent = `${filteredRuns().length} of ${plural(DATA.runs.length, "run")}`;
  byId("reset").disabled = !(CHOSEN.text || CHOSEN.picked.size || CHOSEN.hidden.size);
}

function listenToFilters() {
  let waiting = null;
  byId("search").addEventListener("input", (event) => {
    CHOSEN.text = event.target.value;
    clearTimeout(waiting);
    if (DATA.runs.length <= 50) render();
    else waiting = setTimeout(render, 300); // waits for more input, since rendering takes time
  });
  byId("reset").addEventListener("click", () => {
    CHOSEN.text = byId("search").value = "";
    CHOSEN.picked.clear();
    CHOSEN.hidden.clear();
    render();
  });
}
