(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tensors = data.tensors.map((text) => {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    return new Float32Array(bytes.buffer);
  });
  const colours = {
    weights: Uint8Array.from(atob(data.colours.weights), (letter) => letter.charCodeAt(0)),
    signed: Uint8Array.from(atob(data.colours.signed), (letter) => letter.charCodeAt(0)),
  };
  const { positionWeights, sliceMap, weightNorm, differenceNorm, place } = fullattnMaps;
  const byId = (id) => document.getElementById(id);
  let repeat = null; // shows the two channels again after the maps have changed
  let point = data.point; // in pixels of the original photograph

  function element(tag, options = {}, ...children) {
    const made = Object.assign(document.createElement(tag), options);
    made.append(...children);
    return made;
  }

  const digits = (value) =>
    value === 0 ? "0" : Math.abs(value) < 0.001 ? value.toExponential(1) : value.toPrecision(3);

  // Paint values, row by row, with the colours of a scale.
  function paint(canvas, values, width, norm) {
    const height = values.length / width;
    canvas.width = width;
    canvas.height = height;
    const table = norm.kind === "centred" ? colours.signed : colours.weights;
    const image = new ImageData(width, height);
    values.forEach((value, i) => {
      const colour = Math.round(255 * Math.min(1, Math.max(0, place(value, norm))));
      image.data.set(table.subarray(3 * colour, 3 * colour + 3), 4 * i);
      image.data[4 * i + 3] = 255;
    });
    canvas.getContext("2d").putImageData(image, 0, 0);
  }

  function legend(norm, what = "weight") {
    const bar = element("canvas", { width: 256, height: 1 });
    const steps = Array.from({ length: 256 }, (_, i) => i / 255);
    const straight = norm.kind === "centred" ? { kind: "centred", least: 0, most: 1 }
      : { kind: "linear", least: 0, most: 1 };
    paint(bar, steps, 256, straight);
    const how = norm.kind === "logarithmic" ? ", logarithmic" : "";
    const least = (norm.kind === "logarithmic" || norm.cut ? "≤ " : "") + digits(norm.least);
    const most = (norm.cut ? "≥ " : "") + digits(norm.most);
    return element("div", { className: "legend" }, least, bar, `${most} ${what}${how}`);
  }

  function grey(canvas, values, width) {
    let least = Infinity, most = -Infinity;
    for (const value of values) { least = Math.min(least, value); most = Math.max(most, value); }
    canvas.width = width;
    canvas.height = values.length / width;
    const image = new ImageData(canvas.width, canvas.height);
    values.forEach((value, i) => {
      const shade = most > least ? 255 * (value - least) / (most - least) : 0;
      image.data.set([shade, shade, shade, 255], 4 * i);
    });
    canvas.getContext("2d").putImageData(image, 0, 0);
  }

  // Show the two channels that an entry of a channel map compares.
  function showPair(layer, name, map, i, j) {
    const { height, width } = layer;
    const features = tensors[layer.features];
    byId("channels").hidden = false;
    for (const [id, channel, what] of [["attends", i, "attends"], ["attended", j, "attended to"]]) {
      const canvas = byId(id);
      grey(canvas, features.subarray(channel * height * width, (channel + 1) * height * width), width);
      canvas.nextElementSibling.textContent = `channel ${channel}, ${what}`;
    }
    const weight = map[i * layer.channels + j];
    byId("cell").textContent = `${name}: channel ${i} gives channel ${j} ${digits(weight)}`;
    Object.assign(byId("cell").dataset, { attends: i, attended: j, value: weight });
  }

  // Find the largest value off the diagonal.
  function largestPair(map, channels) {
    let at = Math.min(1, map.length - 1);
    map.forEach((value, k) => { if (k % (channels + 1) !== 0 && value > map[at]) at = k; });
    return [Math.floor(at / channels), at % channels];
  }

  function channelMap(layer, name, label) {
    const canvas = element("canvas", { className: "map", tabIndex: 0 });
    canvas.setAttribute("role", "application");
    canvas.setAttribute("aria-label", `${label}: use the arrow keys to move between channels`);
    const caption = element("figcaption");
    const box = element("figure", {}, canvas, caption);
    let shown = null;
    let cell = [0, 0];
    const again = () => showPair(layer, name(), shown, ...cell);
    const show = (i, j) => {
      const last = layer.channels - 1;
      cell = [Math.min(last, Math.max(0, i)), Math.min(last, Math.max(0, j))];
      repeat = again;
      again();
    };
    canvas.addEventListener("pointermove", (event) => {
      const box = canvas.getBoundingClientRect();
      show(Math.floor((event.clientY - box.top) / box.height * layer.channels),
        Math.floor((event.clientX - box.left) / box.width * layer.channels));
    });
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!step) return;
      event.preventDefault();
      show(cell[0] + step[0], cell[1] + step[1]);
    });
    const update = (values, norm, text, what) => {
      shown = values;
      paint(canvas, values, layer.channels, norm);
      caption.replaceChildren(text, legend(norm, what));
      if (repeat === null) show(...largestPair(values, layer.channels));
      else if (repeat === again) again();
    };
    return { box, canvas, update };
  }

  // One section for each layer; each returns a function that redraws it when the point has moved.

  function positions(layer, section) {
    const over = element("canvas", { className: "weights" });
    over.setAttribute("role", "img");
    const caption = element("figcaption");
    section.append(element("p", { textContent: "The weights that the point gives to every position, over the photograph: one row of the map of positions." }));
    section.append(element("figure", {},
      element("div", { className: "over" }, element("img", { src: data.photograph, alt: "" }), over), caption));
    const { factor, score, width } = layer;
    const branches = layer.branches.map(({ query, key, tokenFeatures, keyWidth, within }) => ({
      query: tensors[query], key: tensors[key], features: tokenFeatures,
      factor, score, width, keyWidth, within,
    }));
    const { keyWidth, keyHeight } = layer.branches[0];
    return (column, row) => {
      const [weights, ...others] = branches.map((branch) => positionWeights(branch, [column, row]));
      for (const other of others) other.forEach((weight, i) => { weights[i] += weight; });
      const norm = weightNorm(weights);
      paint(over, weights, keyWidth, norm);
      let most = 0;
      weights.forEach((weight, i) => { if (weight > weights[most]) most = i; });
      const x = Math.floor((most % keyWidth + 0.5) / keyWidth * data.width);
      const y = Math.floor((Math.floor(most / keyWidth) + 0.5) / keyHeight * data.height);
      const text = `Looks most at (${x}, ${y}), with ${digits(weights[most])}; evenly it would be ${digits(1 / weights.length)}.`;
      over.setAttribute("aria-label", text);
      Object.assign(over.dataset, { position: most, value: weights[most] });
      caption.replaceChildren(text, legend(norm));
    };
  }

  function channels(layer, section) {
    section.append(element("p", { textContent: "The weights that each channel gives to every other: one C×C map for the whole image, whatever the point." }));
    const map = channelMap(layer, () => "whole image", "Map of the whole image");
    section.append(element("div", { className: "maps" }, map.box));
    const values = Float64Array.from(tensors[layer.map]);
    map.canvas.dataset.map = "image";
    map.update(values, weightNorm(values), "the whole image");
    return () => {};
  }

  function slices(layer, section) {
    section.append(element("p", { textContent: `A C×C map for every ${layer.branches.map((branch) => branch.slices).join(" and every ")}: those of the point, and their difference from a channel layer's only map.` }));
    const choice = element("fieldset");
    const inputs = {};
    for (const [value, text] of [["weights", "the maps"], ["difference", "less the channel layer's map"]]) {
      inputs[value] = element("input", { type: "radio", name: `show-${layer.index}`, value, checked: value === "weights" });
      choice.append(element("label", {}, inputs[value], ` ${text}`));
    }
    section.append(choice);
    const names = {};
    const maps = {};
    const box = element("div", { className: "maps" });
    for (const { slices: axis } of layer.branches) {
      maps[axis] = channelMap(layer, () => names[axis], `Map of the point's ${axis}`);
      maps[axis].canvas.dataset.map = axis;
      const strip = element("canvas", { className: "strip" });
      strip.setAttribute("role", "img");
      const words = element("figcaption");
      maps[axis].strip = strip;
      maps[axis].words = words;
      maps[axis].box.append(strip, words);
      box.append(maps[axis].box);
    }
    const single = tensors[layer.single];
    const only = channelMap(layer, () => "channel layer", "The channel layer's only map");
    only.canvas.dataset.map = "only";
    only.update(Float64Array.from(single), weightNorm(single), "the channel layer's only map");
    box.append(only.box);
    section.append(box);
    let at = [0, 0];
    const update = (column, row) => {
      at = [column, row];
      const of = { column, row };
      const found = {};
      for (const { slices, query, key } of layer.branches) {
        const tokens = { ...layer, query: tensors[query] };
        found[slices] = sliceMap(tokens, tensors[key], slices, of[slices]);
        names[slices] = `${slices} ${of[slices]}`;
      }
      const less = inputs.difference.checked;
      if (less) for (const axis in found) found[axis] = found[axis].map((value, i) => value - single[i]);
      // One scale for all, so that they can be compared.
      const both = Object.values(found).flatMap((values) => [...values]);
      const norm = less ? differenceNorm(both, layer.channels) : weightNorm(both);
      for (const { slices: axis, distances } of layer.branches) {
        const text = less ? `${names[axis]} less the channel layer's map` : names[axis];
        maps[axis].update(found[axis], norm, text, less ? "difference" : "weight");
        const away = tensors[distances], index = of[axis];
        bars(maps[axis].strip, away, index);
        const said = `Distance of each ${axis}'s map from the channel layer's: ${digits(away[index])} here; 0 is the same, 1 nothing in common.`;
        maps[axis].words.textContent = said;
        maps[axis].strip.setAttribute("aria-label", said);
      }
    };
    for (const input of Object.values(inputs)) input.addEventListener("change", () => update(...at));
    return update;
  }

  function bars(canvas, values, marked) {
    const styles = getComputedStyle(document.documentElement);
    const wide = 640, high = 88;
    canvas.width = wide;
    canvas.height = high;
    const pen = canvas.getContext("2d");
    const most = values.reduce((a, b) => Math.max(a, b), 1e-3);
    values.forEach((value, i) => {
      pen.fillStyle = styles.getPropertyValue(i === marked ? "--mark" : "--link");
      const from = i * wide / values.length;
      pen.fillRect(from, high * (1 - value / most), Math.max(1, wide / values.length - 1), high * value / most);
    });
  }

  const sections = { positions, channels, slices };
  const updates = data.layers.map((layer, index) => {
    const section = element("section", { id: `layer-${index}` }, element("h2", { textContent: layer.title }));
    byId("layers").append(section);
    return { layer, update: sections[layer.form]({ ...layer, index }, section) };
  });

  const photograph = byId("photograph");
  document.documentElement.style.setProperty("--ratio", data.width / data.height);
  photograph.querySelector("img").src = data.photograph;
  const percent = (part, whole) => `${100 * part / whole}%`;

  function moveTo(x, y) {
    point = [Math.min(data.width - 1, Math.max(0, Math.floor(x))), Math.min(data.height - 1, Math.max(0, Math.floor(y)))];
    byId("point").style.left = percent(point[0] + 0.5, data.width);
    byId("point").style.top = percent(point[1] + 0.5, data.height);
    document.body.dataset.point = point;
    let where = `Point (${point[0]}, ${point[1]}) of ${data.width}×${data.height} pixels`;
    for (const { layer, update } of updates) {
      const column = Math.floor(point[0] * layer.width / data.width);
      const row = Math.floor(point[1] * layer.height / data.height);
      update(column, row);
      if (layer.form === "slices") {
        for (const { slices: id } of layer.branches) {
          const [at, count, from, size] = id === "column"
            ? [column, layer.width, "left", "width"] : [row, layer.height, "top", "height"];
          const bar = byId(id);
          bar.hidden = false;
          bar.style[from] = percent(at, count);
          bar.style[size] = percent(1, count);
          bar.style[id === "column" ? "top" : "left"] = "0";
          bar.style[id === "column" ? "height" : "width"] = "100%";
        }
      }
    }
    const first = updates[0].layer;
    where += `: column ${Math.floor(point[0] * first.width / data.width)}, row ${Math.floor(point[1] * first.height / data.height)} of the ${first.width}×${first.height} feature map.`;
    byId("where").textContent = where;
  }

  function follow(event) {
    const box = photograph.getBoundingClientRect();
    moveTo((event.clientX - box.left) / box.width * data.width, (event.clientY - box.top) / box.height * data.height);
  }
  photograph.addEventListener("pointerdown", (event) => {
    photograph.setPointerCapture(event.pointerId);
    follow(event);
  });
  photograph.addEventListener("pointermove", (event) => { if (event.buttons) follow(event); });
  photograph.addEventListener("keydown", (event) => {
    const first = updates[0].layer;
    const across = data.width / first.width, down = data.height / first.height;
    const step = { ArrowUp: [0, -down], ArrowDown: [0, down], ArrowLeft: [-across, 0], ArrowRight: [across, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    moveTo(point[0] + step[0], point[1] + step[1]);
  });
  moveTo(...point);
})();
