"use strict";
// The cost explorer: controls, a table and bars out of fullattnCosts. The setting stands in the
// address, so that it can be sent to somebody, and nowhere else.

document.addEventListener("DOMContentLoaded", () => {
  const place = document.getElementById("explorer");
  if (place === null) return;

  const { layers: LAYERS, dtypes, devices, backends } = fullattnCostData;
  const NAMES = Object.fromEntries(Object.entries(LAYERS).map(([name, layer]) => [name, layer.title]));
  const PROJECTED = Object.values(LAYERS).filter((layer) => layer.projects).map((layer) => layer.title);
  // A number beside a slider may be any from 1 to the slider's end. Up to there every figure is below
  // 2^53, and so exact in a JavaScript number.
  const LENGTHS = {
    channels: { name: "C, channels", from: 8, to: 2048, step: 8 },
    height: { name: "H, height", from: 4, to: 256, step: 1 },
    width: { name: "W, width", from: 4, to: 256, step: 1 },
    batch: { name: "B, images", from: 1, to: 32, step: 1 },
    threads: { name: "threads", from: 1, to: 32, step: 1 },
  };
  const CHOICES = {
    dtype: { name: "dtype", options: Object.fromEntries(Object.keys(dtypes).map((each) => [each, each])) },
    device: { name: "device", options: devices },
    backend: {
      name: "backend",
      options: {
        automatic: "automatic",
        ...Object.fromEntries(Object.keys(backends).map((each) => [each, each])),
      },
    },
  };
  const PRESETS = {
    "512×97×97": { channels: 512, height: 97, width: 97, batch: 1 },
    "512×128×256": { channels: 512, height: 128, width: 256, batch: 1 },
    "4×128×64×64": { channels: 128, height: 64, width: 64, batch: 4 },
    "64×16×16": { channels: 64, height: 16, width: 16, batch: 1 },
  };
  const START = {
    channels: 512, height: 97, width: 97, batch: 1, threads: 2,
    dtype: "float32", device: "cpu", backend: "automatic", project: false,
  };
  const MIB = 2 ** 20;
  const ROWS = [
    ["backend", "backend that runs", null],
    ["parameters", "parameters", (n) => grouped(n)],
    ["flops", "forward, GFLOPs", (n) => digits(n / 1e9)],
    ["backward_flops", "backward, GFLOPs", (n) => digits(n / 1e9)],
    ["map_numel", "elements in the maps", (n) => grouped(n)],
    ["map_bytes", "the maps built, MiB", (n) => digits(n / MIB)],
    ["inference_bytes", "peak of inference, MiB", (n) => digits(n / MIB)],
    ["training_bytes", "peak of training, MiB", (n) => digits(n / MIB)],
  ];
  const BARS = [
    ["flops", "forward, GFLOPs", 1e9], ["map_bytes", "the maps built, MiB", MIB],
    ["training_bytes", "peak of training, MiB", MIB],
  ];

  function element(tag, options = {}, ...children) {
    const { data = {}, ...others } = options;
    const made = Object.assign(document.createElement(tag), others);
    Object.assign(made.dataset, data);
    made.append(...children);
    return made;
  }

  const grouped = (number) => number.toLocaleString("en");
  const digits = (number) =>
    number >= 100 ? grouped(Math.round(number)) : number < 0.001 ? "< 0.001" : number.toPrecision(3);

  const state = { ...START };
  const fields = {}; // by name, what shows a value in the controls

  // The setting in the address, and out of it.

  function read() {
    for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
      if (name in LENGTHS && problem(name, value) === null) state[name] = Number(value);
      if (name in CHOICES && value in CHOICES[name].options) state[name] = value;
      if (name === "project") state.project = value === "true";
    }
  }

  function write() {
    const changed = Object.entries(state).filter(([name, value]) => value !== START[name]);
    const hash = new URLSearchParams(changed.map(([name, value]) => [name, String(value)]));
    history.replaceState(null, "", changed.length > 0 ? `#${hash}` : location.pathname + location.search);
  }

  // Why a text is no length, or null.
  function problem(name, text) {
    const { name: title, to } = LENGTHS[name];
    if (/^[0-9]+$/.test(String(text).trim()) && Number(text) >= 1 && Number(text) <= to) return null;
    return `${title}: expected a whole number from 1 to ${grouped(to)}, got “${text}”.`;
  }

  // Controls

  function length(name) {
    const { name: title, from, to, step } = LENGTHS[name];
    const slider = element("input", {
      type: "range", min: from, max: to, step, id: `explore-${name}`, name,
    });
    const number = element("input", {
      type: "text", inputMode: "numeric", id: `explore-${name}-number`, name,
    });
    number.setAttribute("aria-label", `${title}, as a number`);
    number.setAttribute("aria-describedby", "explore-said");
    slider.addEventListener("input", () => change(name, Number(slider.value)));
    number.addEventListener("input", () => {
      const wrong = problem(name, number.value);
      number.setAttribute("aria-invalid", String(wrong !== null));
      said.textContent = wrong ?? "";
      if (wrong === null) change(name, Number(number.value), number);
    });
    number.addEventListener("change", () => {
      if (problem(name, number.value) !== null) show();
    });
    fields[name] = (except) => {
      slider.value = state[name];
      if (except === number) return;
      number.value = state[name];
      number.setAttribute("aria-invalid", "false");
    };
    return element("div", { className: "length", data: { control: name } },
      element("label", { htmlFor: slider.id }, title), slider, number);
  }

  function choice(name) {
    const { name: title, options } = CHOICES[name];
    const select = element("select", { id: `explore-${name}`, name });
    for (const [value, text] of Object.entries(options)) {
      select.append(element("option", { value }, text));
    }
    select.addEventListener("change", () => change(name, select.value));
    fields[name] = () => { select.value = state[name]; };
    return element("label", { className: "choice" }, title, select);
  }

  function projection() {
    const box = element("input", { type: "checkbox", id: "explore-project", name: "project" });
    box.addEventListener("change", () => change("project", box.checked));
    fields.project = () => { box.checked = state.project; };
    return element("label", { className: "check" }, box, `with the 3×3 projection of ${PROJECTED.join(" and ")}`);
  }

  function presets() {
    const buttons = Object.entries(PRESETS).map(([text, setting]) => {
      const button = element("button", { type: "button" }, text);
      button.addEventListener("click", () => {
        Object.assign(state, setting);
        show();
      });
      return button;
    });
    return element("div", { className: "presets" }, ...buttons);
  }

  function change(name, value, except) {
    state[name] = value;
    show(except);
  }

  // Results

  const said = element("p", { className: "said", id: "explore-said" });
  said.setAttribute("role", "alert");
  const result = element("div", { id: "explore-result" });
  // What a screen reader says after a change: one sentence, not the table.
  const summary = element("p", { className: "summary", id: "explore-summary" });
  summary.setAttribute("aria-live", "polite");

  function table(costs) {
    const head = element("tr", {}, element("td"), ...Object.keys(costs).map((layer) =>
      element("th", { className: layer, scope: "col" }, NAMES[layer])));
    const body = ROWS.map(([figure, title, format]) => element("tr", {},
      element("th", { scope: "row" }, title),
      ...Object.entries(costs).map(([layer, cost]) => {
        const value = cost[figure];
        if (value === undefined) return element("td", { data: { layer, figure } }, "–");
        const options = { data: { layer, figure, value } };
        if (format !== null) options.title = grouped(value);
        return element("td", options, format === null ? value : format(value));
      })));
    return element("div", { className: "scroll" },
      element("table", { className: "costs" }, element("thead", {}, head), element("tbody", {}, ...body)));
  }

  function bars(costs) {
    return BARS.map(([figure, title, unit]) => {
      const most = Math.max(1, ...Object.values(costs).map((cost) => cost[figure] ?? 0));
      const lines = Object.entries(costs).map(([layer, cost]) => {
        const value = cost[figure];
        const bar = element("div", { className: `bar ${layer}` });
        bar.style.width = `${100 * (value ?? 0) / most}%`;
        bar.hidden = value === undefined;
        return element("div", { className: "line" },
          element("span", { className: "of" }, NAMES[layer]),
          element("span", { className: "track" }, bar),
          element("span", { className: "number" }, value === undefined ? "–" : digits(value / unit)));
      });
      return element("div", { className: "bars", data: { figure } },
        element("h3", {}, `${title}, from 0`), ...lines);
    });
  }

  function show(except) {
    for (const field of Object.values(fields)) field(except);
    const costs = Object.fromEntries(fullattnCosts.layers.map((layer) =>
      [layer, fullattnCosts.cost({ layer, ...state })]));
    const flops = Object.entries(costs).filter(([, cost]) => cost.flops !== undefined).map(
      ([layer, cost]) => `${NAMES[layer]} ${digits(cost.flops / 1e9)}`);
    summary.textContent = `${state.batch}×${state.channels}×${state.height}×${state.width}, ${state.dtype}: `
      + (flops.length > 0 ? `forward ${flops.join(", ")} GFLOPs.` : "this backend runs none of them.");
    const reasons = Object.entries(costs).filter(([, cost]) => cost.reason !== undefined).map(
      ([layer, cost]) => element("p", { className: "reason", data: { layer } },
        `${NAMES[layer]}: ${cost.reason}.`));
    result.replaceChildren(...reasons, element("div", { className: "both" },
      table(costs), element("div", { className: "all-bars" }, ...bars(costs))));
    place.querySelector("[data-control=threads]").hidden = state.device !== "cpu";
    if (except === undefined) said.textContent = "";
    write();
  }

  read();
  place.replaceChildren(
    presets(),
    element("div", { className: "controls" },
      element("div", {}, ...["channels", "height", "width", "batch"].map(length)),
      element("div", {}, ...Object.keys(CHOICES).map(choice), length("threads"), projection())),
    said, summary, result);
  show();
  window.addEventListener("hashchange", () => {
    // The link to the title and the one that skips to the text name a place, not a setting.
    if (location.hash !== "" && !location.hash.includes("=")) return;
    Object.assign(state, START);
    read();
    show();
  });
});
