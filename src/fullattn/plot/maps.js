"use strict";
// Similarity maps from queries and keys, as fullattn.attention computes them, without the page. The
// tests run this file in a JavaScript engine and compare with Python.

const fullattnMaps = (() => {
  // Softmax over scores[from .. from + count), in place.
  function softmax(scores, from, count) {
    let most = -Infinity;
    for (let i = from; i < from + count; i++) most = Math.max(most, scores[i]);
    let sum = 0;
    for (let i = from; i < from + count; i++) sum += scores[i] = Math.exp(scores[i] - most);
    for (let i = from; i < from + count; i++) scores[i] /= sum;
  }

  // The weights that one position gives. query (D, h, w), key (D, h', w'); returns h'·w' weights, 0
  // outside the position's row or column if attention is limited to it.
  function positionWeights({ query, key, features, factor, score, width, keyWidth, within }, at) {
    const [column, row] = at;
    const count = query.length / features, total = key.length / features;
    const inside = [];
    for (let m = 0; m < total; m++) {
      if (within === "row" && Math.floor(m / keyWidth) !== row) continue;
      if (within === "column" && m % keyWidth !== column) continue;
      inside.push(m);
    }
    const found = new Float64Array(inside.length);
    for (let d = 0; d < features; d++) {
      const q = query[d * count + row * width + column];
      inside.forEach((m, i) => {
        const k = key[d * total + m];
        found[i] += score === "concatenation" ? q + k : q * k * factor;
      });
    }
    if (score === "concatenation") found.forEach((each, i) => { found[i] = Math.max(each, 0); });
    if (score === "softmax") softmax(found, 0, found.length);
    else found.forEach((each, i) => { found[i] = each / found.length; });
    const weights = new Float64Array(total);
    inside.forEach((m, i) => { weights[m] = found[i]; });
    return weights;
  }

  // The (C, C) map of one column or row of a query (C, H, W); key is (1 or slices, C, H or W).
  function sliceMap({ query, channels, height, width, factor }, key, slices, index) {
    const length = slices === "column" ? height : width;
    const start = slices === "column" ? index : index * width;
    const step = slices === "column" ? width : 1;
    const own = key.length > channels * length ? index * channels * length : 0;
    const map = new Float64Array(channels * channels);
    for (let i = 0; i < channels; i++) {
      const from = i * height * width + start;
      for (let j = 0; j < channels; j++) {
        let score = 0;
        for (let d = 0; d < length; d++) score += query[from + d * step] * key[own + j * length + d];
        map[i * channels + j] = score * factor;
      }
      softmax(map, i * channels, channels);
    }
    return map;
  }

  // The colour scale for weights, as in fullattn.plot.figures.weight_norm.
  function weightNorm(values) {
    let least = Infinity;
    let most = -Infinity;
    for (const value of values) {
      least = Math.min(least, value);
      most = Math.max(most, value);
    }
    if (least < 0) {
      const half = Math.max(-least, most);
      return { kind: "centred", least: -half, most: half };
    }
    if (least > most / 10 || most === 0) return { kind: "linear", least: 0, most: most || 1 };
    return { kind: "logarithmic", least: Math.max(least, most / 1e4), most };
  }

  // The colour scale for differences of concatenated (C, C) maps, as in difference_norm.
  function differenceNorm(values, channels) {
    let most = 0;
    let apart = 0;
    values.forEach((value, i) => {
      const size = Math.abs(value);
      most = Math.max(most, size);
      if (i % (channels * channels) % (channels + 1) !== 0) apart = Math.max(apart, size);
    });
    const half = apart || most || 1;
    return { kind: "centred", least: -half, most: half, cut: half < most };
  }

  // The place of a value on a scale, from 0 to 1.
  function place(value, { kind, least, most }) {
    if (kind === "logarithmic") {
      return Math.log(Math.max(value, least) / least) / Math.log(most / least);
    }
    return (value - least) / (most - least);
  }

  return { positionWeights, sliceMap, weightNorm, differenceNorm, place };
})();
