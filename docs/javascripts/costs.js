"use strict";
// A small evaluator of the formulas of fullattn.costs, which docs/explorer.py writes as data: no
// formula, layer or backend has its name here. Nothing here knows of a page.

const fullattnCosts = ((data) => {
  const OPERATIONS = {
    "+": (a, b) => a + b,
    "-": (a, b) => a - b,
    "*": (a, b) => a * b,
    "//": (a, b) => Math.floor(a / b),
    "<": (a, b) => Number(a < b),
    "==": (a, b) => Number(a === b),
    max: Math.max,
    min: Math.min,
    where: (condition, a, b) => (condition ? a : b),
  };

  // A function from a place in data.places to its value; a term is computed once, when first asked.
  function evaluator(symbols) {
    const found = new Map();
    const value = (at) => {
      if (!found.has(at)) {
        const term = data.terms[at];
        if (typeof term === "string") found.set(at, symbols[term]);
        else if (typeof term === "number") found.set(at, term);
        else found.set(at, OPERATIONS[term[0]](...term.slice(1).map(value)));
      }
      return found.get(at);
    };
    return (place) => value(data.places[place]);
  }

  // Why a backend cannot run, or null.
  function reasonAgainst(name, form, value, dtype) {
    const backend = form.backends[name];
    if (dtype in backend.reasons) return backend.reasons[dtype];
    const most = backend.most_features, features = value(form.features);
    return most !== null && features > most ? `${name} takes up to ${most} features, not ${features}` : null;
  }

  // What a layer costs, as fullattn.costs.cost says it, or {reason} where the backend cannot run it.
  function cost({ layer, batch, channels, height, width, dtype, device, threads, backend, project }) {
    const form = data.layers[layer].forms[project ? "whole" : "bare"][device];
    const size = data.dtypes[dtype];
    const value = evaluator({ batch, channels, height, width, size, threads });
    let name = backend;
    if (backend === "automatic") {
      // As fullattn.attention.dispatch decides it, where all backends are there.
      const build = form.map_numel !== null && value(form.map_numel) < value(form.token_numel);
      const able = form.fused.filter((each) => reasonAgainst(each, form, value, dtype) === null);
      name = build || able.length === 0 ? form.builds : able[0];
    }
    const reason = reasonAgainst(name, form, value, dtype);
    if (reason !== null) return { reason };
    const figures = Object.entries(form.backends[name].figures);
    return {
      backend: name,
      parameters: value(form.parameters),
      ...Object.fromEntries(figures.map(([figure, place]) => [figure, value(place)])),
    };
  }

  return { cost, layers: Object.keys(data.layers), dtypes: Object.keys(data.dtypes) };
})(fullattnCostData);
