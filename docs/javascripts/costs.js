"use strict";
// The formulas of src/fullattn/costs.py for the three layers with their default options, under the
// same names so that both can be read side by side. tests/test_cost_explorer.py holds every figure
// against Python: change both together. Nothing here knows of a page.

const fullattnCosts = (() => {
  const SIZES = { float32: 4, bfloat16: 2, float16: 2 };
  const WORK = 4; // bytes of a number where scores and softmax are computed

  const prod = (sizes) => sizes.reduce((a, b) => a * b, 1);
  const div = (a, b) => Math.floor(a / b);
  const ceilDiv = (a, b) => Math.ceil(a / b);
  const same = (a, b) => a.every((size, i) => size === b[i]);

  // attention/flops.py

  function attend(query, key, value) {
    return 2 * prod(query.slice(0, 3)) * key[2] * (query[3] + value[3]);
  }

  function attendBackward(query, key, value) {
    return 2 * prod(query.slice(0, 3)) * key[2] * (3 * query[3] + 2 * value[3]);
  }

  // One call of attention.attend: {query, key, value, contiguous, inPlace, valueIsQuery}, with the
  // setting's size, half, device and threads. What comes out is costs._Footprint.

  function reference(a, setting) {
    const { size, half } = setting;
    const out = [...a.query.slice(0, 3), a.value[3]];
    const maps = prod(a.query.slice(0, 3)) * a.key[2] * WORK;
    const query = prod(a.query) * WORK, key = prod(a.key) * WORK;
    const value = prod(a.value) * WORK, outWork = prod(out) * WORK;
    const expandedKey = key / a.key[1] * a.query[1];
    const casts = half ? query + key : 0;
    const valueCast = half ? value : 0;
    // Slices of several images do not merge into one axis, so the batched products copy them.
    const copied = a.query[0] > 1 && a.query[1] > 1;
    const copies = copied ? query + expandedKey : 0;
    const valueCopy = copied ? value : 0;
    const output = prod(out) * size;
    const outputCast = half ? output : 0;
    const savedValue = valueCopy || valueCast;
    const saved = maps + (copies || casts) + savedValue;
    const building = casts + Math.max(copies + maps, 2 * maps);
    const gradOut = copied || half ? outWork : 0;
    const gradValue = saved + gradOut + value + maps;
    const gradOthers = saved - savedValue + value + Math.max(2 * maps, query + expandedKey);
    const products = attend(a.query, a.key, a.value);
    return {
      flops: products,
      backwardFlops: 2 * products,
      output,
      inference: Math.max(building, maps + outWork + Math.max(valueCast + valueCopy, outputCast)),
      saved,
      forward: Math.max(
        copies + building,
        saved + outWork + Math.max(copied ? valueCast : 0, outputCast),
      ),
      backward: Math.max(gradValue + output, gradOthers),
      backwardShared: Math.max(gradValue, gradOthers),
      keepsInputs: !half,
      keepsOutput: false,
    };
  }

  function chunked(a, setting) {
    const { size, half } = setting;
    const BLOCK = 2 ** 19, GATHER = 16;
    const [batch, slices, tokens] = a.query;
    const memory = a.key[2];
    const atOnce = Math.max(1, div(BLOCK, Math.max(1, tokens * memory)));
    const rows = tokens * memory > 2 * BLOCK ? Math.max(64, div(BLOCK, memory)) : tokens;
    const gatheredSlices = Math.max(GATHER, atOnce);
    const group = Math.min(gatheredSlices, slices);
    // From the second group on, a tensor is there twice while it is made again.
    const fullAgain = slices >= 2 * group || (batch > 1 && slices === group);
    const again = fullAgain ? group : slices - group;
    const buffer = Math.min(atOnce, slices) * rows * memory * WORK;
    const out = [...a.query.slice(0, 3), a.value[3]];
    const ofSlice = (shape) => prod(shape.slice(2)) * WORK;
    const gathered = (shape) => (a.inPlace && !half ? 0 : ofSlice(shape));
    const query = gathered(a.query), grad = gathered(out);
    const value = a.valueIsQuery ? 0 : gathered(a.value);
    const key = half ? ofSlice(a.key) : 0;
    // A cast keeps the strides, and is copied once more.
    const casting = half && !a.contiguous ? 2 : 1;
    const result = ofSlice(out);
    const output = prod(out) * size;
    const held = a.valueIsQuery && slices === 1 ? query : 0;
    const inference = output + buffer + key + group * (query + value + result)
      + again * Math.max(casting * query, casting * value, result, held + key);
    const toQuery = ofSlice(a.query), toKey = ofSlice(a.key), toValue = ofSlice(a.value);
    const grads = (prod(a.query) + prod(a.key) + prod(a.value)) * size;
    const repeated = again * (slices === 1
      ? query + key + value + grad + toQuery + toKey + toValue
      : query + value + grad + Math.max(toQuery, toValue));
    const backward = grads + 2 * buffer + key
      + group * (query + value + grad + toQuery + toValue) + toKey + repeated;
    return {
      flops: attend(a.query, a.key, a.value),
      backwardFlops: attendBackward(a.query, a.key, a.value),
      output,
      inference,
      saved: 0,
      forward: inference,
      backward: backward + output,
      backwardShared: backward,
      keepsInputs: true,
      keepsOutput: false,
    };
  }

  function paddedFeatures(device, features, valueFeatures) {
    if (device === "cuda") return [ceilDiv(features, 8) * 8, ceilDiv(valueFeatures, 8) * 8];
    if (features === valueFeatures && features > 1) return [features, features];
    const longest = Math.max(features, valueFeatures, 2);
    return [longest, longest];
  }

  function sdpa(a, setting) {
    const { size, device } = setting;
    const [features, valueFeatures] = paddedFeatures(device, a.query[3], a.value[3]);
    const query = [...a.query.slice(0, 3), features], key = [...a.key.slice(0, 3), features];
    const value = [...a.value.slice(0, 3), valueFeatures];
    const out = [...a.query.slice(0, 3), valueFeatures];
    let copies = 0;
    for (const [given, taken] of [[a.query, query], [a.key, key], [a.value, value]]) {
      if (!a.contiguous || !same(given, taken)) copies += prod(taken) * size;
    }
    const output = prod(out) * size;
    const saved = copies + prod(out.slice(0, 3)) * 4; // and a logarithm for each row
    const [forwardBlock, backwardBlock] = sdpaBlocks(a, setting, valueFeatures);
    // The fused kernel takes the key's copy as if it had all slices, and so comes its gradient.
    const grads = (prod(query) + prod(a.query.slice(0, 2)) * a.key[2] * (features + valueFeatures))
      * size;
    const backward = saved + grads + backwardBlock;
    return {
      flops: attend(query, key, value),
      backwardFlops: attendBackward(query, key, value),
      output,
      inference: saved + output + forwardBlock,
      saved,
      forward: saved + output + forwardBlock,
      backward: backward + output,
      backwardShared: backward + (valueFeatures !== a.value[3] ? output : 0),
      keepsInputs: copies === 0,
      keepsOutput: true,
    };
  }

  // Buffers of the CPU kernel: blocks of the map, one set a thread.
  function sdpaBlocks(a, { size, half, device, threads }, valueFeatures) {
    if (device !== "cpu") return [0, 0];
    const tokens = a.query[2];
    const rows = Math.min(tokens, tokens >= 768 ? 256 : tokens >= 192 ? 64 : 32);
    const block = rows * Math.min(a.key[2], 512) * (WORK + (half ? size : 0));
    const rest = rows * (2 + valueFeatures) * WORK;
    return [threads * (block + rest), threads * 2 * block];
  }

  const ATTENTION = { reference, chunked, sdpa };

  // Both branches of FullyAttentional in one pass.

  function native(setting) {
    const { size, shape, threads } = setting;
    const [batch, , height, width] = shape;
    const x = prod(shape) * size;
    const casts = size < 4 ? prod(shape) * 4 : 0;
    const row = ceilDiv(shape[1], 32) * 32 + 16;
    const columns = Math.min(16, width, ceilDiv(batch * width, threads));
    const keys = row * (height + width);
    const block = Math.max(columns * height, width);
    const forwardRoom = 4 * (batch * keys + threads * row * (block * 2 + 32));
    const backwardRoom = 4
      * ((2 * batch + threads) * keys + threads * row * (block * 3 + 2 * (32 + 64)));
    return {
      flops: 8 * prod(shape) * shape[1],
      backwardFlops: 20 * prod(shape) * shape[1],
      output: x,
      inference: x + 2 * casts + forwardRoom,
      saved: 0,
      forward: x + 2 * casts + forwardRoom,
      backward: 2 * x + 3 * casts + backwardRoom,
      backwardShared: x + 3 * casts + backwardRoom,
      keepsOutput: false,
    };
  }

  function triton(setting) {
    const { size, shape } = setting;
    const [batch, channels, height, width] = shape;
    const x = prod(shape) * size;
    const rows = 4 * batch * channels * (height + width); // a number for each row of each map
    const rooms = [
      tritonRoom([batch, width, channels, height], size, false),
      tritonRoom([batch, height, channels, width], size, width % 16 === 0),
    ];
    const forward = Math.max(...rooms.map((room) => room[0]));
    const backward = Math.max(...rooms.map((room) => room[1]));
    const gradKeys = batch * channels * (height + width) * (4 + size);
    return {
      flops: 8 * prod(shape) * channels,
      backwardFlops: 20 * prod(shape) * channels,
      output: x,
      inference: x + rows + forward,
      saved: rows,
      forward: x + rows + forward,
      backward: 2 * x + 2 * rows + gradKeys + backward,
      backwardShared: x + 2 * rows + gradKeys + backward,
      keepsOutput: false,
    };
  }

  // What one branch takes besides, forward and backward; launch.window and launch.slices_each.
  function tritonRoom([batch, count, channels, given], size, inPlace) {
    const WINDOW = 24 * 2 ** 20, PROGRAMS = 528, ALIGNED = 16;
    const even = (total, most) => ceilDiv(total, ceilDiv(total, most));
    let images = batch, width = count, features = given, windows = 0, key = 0;
    if (!inPlace) {
      features = ceilDiv(given, ALIGNED) * ALIGNED;
      const atOnce = Math.max(1, div(WINDOW, channels * features * size));
      images = even(batch, Math.max(1, div(atOnce, count)));
      width = even(count, Math.min(atOnce, count));
      windows = images * width * channels * features * size;
      key = batch * channels * features * size;
    }
    const each = Math.max(1, div(images * width * ceilDiv(channels, 64), PROGRAMS));
    const sums = 4 * images * (ceilDiv(width, each) + 1) * channels * features;
    return [2 * windows + key, 3 * windows + key + sums];
  }

  const COLUMNS_AND_ROWS = { native, triton };

  // Which backend runs, as attention/dispatch.py decides it where all backends are there.

  function choose(layer, setting, mapNumbers, tensorNumbers) {
    if (setting.backend !== "automatic") return setting.backend;
    if (layer !== "fully") return mapNumbers < tensorNumbers ? "reference" : "sdpa";
    if (setting.device === "cpu") return "native";
    return reasonAgainst("triton", layer, setting) === null ? "triton" : "sdpa";
  }

  // Why a backend cannot run a layer, or null.
  function reasonAgainst(backend, layer, { device, shape }) {
    const where = { cpu: "the CPU", cuda: "a GPU" };
    const home = { native: "cpu", chunked: "cpu", triton: "cuda" }[backend];
    const reasons = [];
    if (backend in COLUMNS_AND_ROWS && layer !== "fully") {
      reasons.push(`${backend} runs the columns and rows of FullyAttentional alone`);
    }
    if (home !== undefined && home !== device) {
      reasons.push(`${backend} runs on ${where[home]}, not on ${where[device]}`);
    }
    const longest = Math.max(shape[2], shape[3]);
    if (backend === "triton" && layer === "fully" && longest > 512) {
      reasons.push(`triton takes H and W up to 512, not ${longest}`);
    }
    return reasons.length > 0 ? reasons.join("; ") : null;
  }

  function fully(setting) {
    const { shape, size, project } = setting;
    const [batch, channels, height, width] = shape;
    const mapNumbers = (height + width) * channels ** 2;
    const backend = choose("fully", setting, mapNumbers, 4 * channels * height * width);
    const reason = reasonAgainst(backend, "fully", setting);
    if (reason !== null) return { reason };
    let branches;
    if (backend in COLUMNS_AND_ROWS) {
      branches = [COLUMNS_AND_ROWS[backend](setting)];
    } else {
      branches = [[width, height, false], [height, width, true]].map(([slices, length, inPlace]) => {
        const query = [batch, slices, channels, length], key = [batch, 1, channels, length];
        const a = { query, key, value: query, contiguous: false, inPlace, valueIsQuery: true };
        return ATTENTION[backend](a, setting);
      });
    }
    const sum = (name) => branches.reduce((total, branch) => total + branch[name], 0);
    const linears = 2 * batch * channels ** 2 * (height + width);
    const convolution = project ? 18 * channels * prod(shape) : 0;
    const projection = project ? 9 * channels ** 2 + 2 * channels : 0;
    return {
      backend,
      parameters: 2 * channels ** 2 + 2 * channels + 1 + projection,
      flops: sum("flops") + linears + convolution,
      backward_flops: sum("backwardFlops") + 2 * (linears + convolution),
      map_numbers: batch * mapNumbers,
      inference_bytes: Math.max(...fullyInference(setting, branches, projection * size)),
      training_bytes: Math.max(
        ...fullyTraining(setting, branches, projection * size, backend === "triton"),
      ),
    };
  }

  function fullyInference({ shape, size, project }, branches, weights) {
    const x = prod(shape) * size;
    const keys = shape[0] * shape[1] * (shape[2] + shape[3]) * size;
    const alive = [];
    let done = 0;
    for (const branch of branches) {
      alive.push(keys + done + branch.inference);
      done += branch.output;
    }
    if (branches.length > 1) alive.push(keys + done + x);
    if (project) alive.push(2 * x + (x + weights), 3 * x);
    return alive;
  }

  function fullyTraining({ shape, size, project }, branches, weights, addsResidual) {
    const channels = shape[1];
    const x = prod(shape) * size;
    const keys = shape[0] * channels * (shape[2] + shape[3]) * size;
    const kept = (branch) => branch.saved + (branch.keepsOutput ? branch.output : 0);
    const alive = [];
    let held = 2 * keys; // contexts and keys
    for (const branch of branches) {
      alive.push(held + branch.forward);
      held += kept(branch);
    }
    if (branches.length > 1) {
      const outputs = branches.map((branch) => (branch.keepsOutput ? 0 : branch.output));
      alive.push(held + outputs.reduce((a, b) => a + b, 0) + x);
    }
    const attended = addsResidual ? 0 : x;
    const gradSum = project ? x : 0; // the gradient of the sum with x
    if (project) {
      const before = held + attended + x;
      alive.push(before + Math.max(3 * x, x + (x + weights)));
      alive.push(before + x + x + 2 * x);
      alive.push(before + x + x + gradSum + weights + 2 * x);
    }
    let others = x + gradSum + weights;
    if (!addsResidual) alive.push(held + attended + others + 2 * x);
    for (const branch of [...branches].reverse()) {
      // The gradient of the attended values stays until both branches have had it.
      const last = branch === branches[0];
      const grad = addsResidual ? 0 : x;
      const peak = last && grad ? branch.backward : grad + branch.backwardShared;
      alive.push(held - branch.saved + others + peak);
      held -= kept(branch);
      others += x;
    }
    alive.push(held + others + 2 * (channels ** 2 + channels) * size + x);
    return alive;
  }

  function channel(setting) {
    const { shape, size } = setting;
    const [batch, channels, height, width] = shape;
    const mapNumbers = channels ** 2;
    const backend = choose("channel", setting, mapNumbers, 2 * channels * height * width);
    const reason = reasonAgainst(backend, "channel", setting);
    if (reason !== null) return { reason };
    const tokens = [batch, 1, channels, height * width];
    const attention = ATTENTION[backend]({
      query: tokens, key: tokens, value: tokens, contiguous: true, inPlace: true, valueIsQuery: true,
    }, setting);
    const x = prod(shape) * size, attended = attention.output;
    return {
      backend,
      parameters: 1,
      flops: attention.flops,
      backward_flops: attention.backwardFlops,
      map_numbers: batch * mapNumbers,
      inference_bytes: attention.inference,
      training_bytes: Math.max(
        attention.forward,
        attention.saved + attended + x + 2 * x,
        x + (attention.keepsOutput ? attended : 0) + attention.backward,
        x + 4 * x,
      ),
    };
  }

  function spatial(setting) {
    const { shape, size } = setting;
    const [batch, channels, height, width] = shape;
    const inner = Math.max(1, div(channels, 2));
    const positions = height * width;
    const mapNumbers = positions ** 2;
    const backend = choose("spatial", setting, mapNumbers, 2 * positions * inner);
    const reason = reasonAgainst(backend, "spatial", setting);
    if (reason !== null) return { reason };
    const tokens = [batch, 1, positions, inner];
    const attention = ATTENTION[backend]({
      query: tokens, key: tokens, value: tokens, contiguous: false, inPlace: true, valueIsQuery: false,
    }, setting);
    const x = prod(shape) * size, full = inner * batch * positions * size;
    const convolutions = 2 * batch * channels * positions * 4 * inner;
    const inputs = 3 * full, attended = attention.output;
    const keptInputs = attention.keepsInputs ? inputs : 0;
    const kept = keptInputs + attention.saved;
    const held = keptInputs + (attention.keepsOutput ? attended : 0) + x;
    const weights = channels * inner * size;
    return {
      backend,
      parameters: 3 * (channels * inner + inner) + inner * channels + channels + 2 * channels,
      flops: attention.flops + convolutions,
      backward_flops: attention.backwardFlops + 2 * convolutions,
      map_numbers: batch * mapNumbers,
      inference_bytes: Math.max(inputs + attention.inference, attended + 2 * x),
      training_bytes: Math.max(
        inputs + attention.forward,
        kept + attended + 3 * x, // output, normalised, sum with x; and the normalisation, backward
        kept + attended + 2 * x + full + weights,
        held + weights + attention.backward,
        x + inputs + 2 * x + 4 * weights, // convolutions, backward
      ),
    };
  }

  const LAYERS = { fully, channel, spatial };

  // What a layer costs, as fullattn.costs.cost says it, or {reason} where the backend cannot run it.
  function cost({ layer, batch, channels, height, width, dtype, device, threads, backend, project }) {
    const size = SIZES[dtype];
    const setting = {
      shape: [batch, channels, height, width], size, half: size < WORK,
      device, threads, backend, project,
    };
    const found = LAYERS[layer](setting);
    return "reason" in found ? found : { ...found, map_bytes: found.map_numbers * WORK };
  }

  return { cost, layers: Object.keys(LAYERS), dtypes: Object.keys(SIZES) };
})();
