// What fedlab adds to NiiVue, in a notebook and in a saved page: an arrangement of views that fills the canvas, the
// reference and an arm side by side, lit surfaces in a translucent brain, marks of orientation, and tools below the views.
// `Niivue`, `NVImage` and `NVMesh` are NiiVue's classes.

const AXIAL = 0, CORONAL = 1, SAGITTAL = 2, ALL = 3, SOLID = 4;
const NAMES = { [AXIAL]: "axial", [CORONAL]: "coronal", [SAGITTAL]: "sagittal", [SOLID]: "3-D" };
const SIDES = { [AXIAL]: "RLAP", [CORONAL]: "RLSI", [SAGITTAL]: "APSI" };  // left, right, top and bottom of a slice
const BRAIN_CELLS = 72, TUMOUR_CELLS = 110;  // along the longest side of a surface; a larger body is decimated
const ROUNDS = 8;  // of smoothing
const SHADER = `#version 300 es
precision highp float;
uniform float opacity;
in vec4 vClr;
in vec3 vN;
out vec4 color;
void main() {
  vec3 n = normalize(vN);
  float facing = abs(n.z), light = max(dot(n, normalize(vec3(-0.35, 0.5, -0.8))), 0.0);
  if (opacity < 1.0) {  // glass: clear where it faces the viewer, bright at its rim
    color = vec4(vClr.rgb * (0.7 + 0.6 * light), 0.3 + 0.6 * pow(1.0 - facing, 1.6));
  } else {
    float shine = pow(max(dot(reflect(vec3(0.0, 0.0, 1.0), n), normalize(vec3(-0.35, 0.5, -0.8))), 0.0), 24.0);
    color = vec4(vClr.rgb * (0.42 + 0.68 * light) + 0.22 * shine, 1.0);
  }
}`;

function element(tag, parent, properties = {}, style = "") {
  const made = Object.assign(document.createElement(tag), properties);
  made.style.cssText = style;
  parent.append(made);
  return made;
}

/** The voxels of some values within their bounds, every `step`-th along each axis, with an empty rim. */
function cutOut(values, [nx, ny, nz], wanted, most) {
  const low = [nx, ny, nz], high = [-1, -1, -1];
  let count = 0;
  for (let z = 0, at = 0; z < nz; z++) for (let y = 0; y < ny; y++) for (let x = 0; x < nx; x++, at++) {
    if (!wanted[values[at]]) continue;
    count++;
    if (x < low[0]) low[0] = x;
    if (x > high[0]) high[0] = x;
    if (y < low[1]) low[1] = y;
    if (y > high[1]) high[1] = y;
    low[2] = Math.min(low[2], z);
    high[2] = z;
  }
  if (high[0] < 0) return null;
  const step = Math.ceil(Math.max(...high.map((end, axis) => end - low[axis] + 1)) / most);
  const size = high.map((end, axis) => Math.floor((end - low[axis]) / step) + 3);
  const mask = new Uint8Array(size[0] * size[1] * size[2]);
  for (let z = 1; z < size[2] - 1; z++) for (let y = 1; y < size[1] - 1; y++) {
    let from = low[0] + nx * (low[1] + (y - 1) * step + ny * (low[2] + (z - 1) * step));
    for (let x = 1, to = 1 + size[0] * (y + size[1] * z); x < size[0] - 1; x++, to++, from += step)
      mask[to] = wanted[values[from]];
  }
  return { mask, size, low, step, count };
}

/** Surface of a mask by surface nets (Gibson 1998): one vertex per mixed cell, smoothed but kept within its cell. */
function surface({ mask, size: [sx, sy, sz], low, step }) {
  const strides = [1, sx, sx * sy], index = new Int32Array(mask.length).fill(-1), cells = [], quads = [];
  for (let z = 0; z < sz - 1; z++) for (let y = 0; y < sy - 1; y++) for (let x = 0; x < sx - 1; x++) {
    const at = x + sx * (y + sy * z);
    let filled = 0;
    for (let corner = 0; corner < 8; corner++)
      filled += mask[at + (corner & 1) + (corner >> 1 & 1) * sx + (corner >> 2) * strides[2]];
    if (filled === 0 || filled === 8) continue;
    index[at] = cells.length / 3;
    cells.push(x + 0.5, y + 0.5, z + 0.5);
  }
  for (let z = 0; z < sz - 1; z++) for (let y = 0; y < sy - 1; y++) for (let x = 0; x < sx - 1; x++) {
    const at = x + sx * (y + sy * z);
    for (let axis = 0; axis < 3; axis++) {
      if (mask[at] === mask[at + strides[axis]]) continue;
      const u = strides[(axis + 1) % 3], v = strides[(axis + 2) % 3];
      const around = [at - u - v, at - v, at, at - u].map(cell => index[cell]);
      quads.push(...(mask[at] ? around : around.reverse()));
    }
  }
  let points = Float32Array.from(cells);
  for (let round = 0; round < ROUNDS; round++) {
    const sums = new Float32Array(points.length), counts = new Uint8Array(points.length / 3);
    for (let quad = 0; quad < quads.length; quad += 4) for (let side = 0; side < 4; side++) {
      const a = quads[quad + side], b = quads[quad + (side + 1 & 3)];
      for (let axis = 0; axis < 3; axis++) {
        sums[3 * a + axis] += points[3 * b + axis];
        sums[3 * b + axis] += points[3 * a + axis];
      }
      counts[a]++;
      counts[b]++;
    }
    points = points.map((value, at) => Math.min(Math.max((value + sums[at] / counts[at / 3 | 0]) / 2,
                                                         cells[at] - 0.5), cells[at] + 0.5));
  }
  const triangles = new Uint32Array(quads.length * 1.5);
  for (let quad = 0, to = 0; quad < quads.length; quad += 4)
    for (const corner of [0, 1, 2, 0, 2, 3]) triangles[to++] = quads[quad + corner];
  return { points: points.map((value, at) => low[at % 3] + (value - 1) * step), triangles };
}

/** Volume and area of a surface in mm, and the sums of its triangles' normals at each vertex. */
function measured({ points, triangles }) {
  const normals = new Float32Array(points.length);
  let volume = 0, area = 0;
  for (let at = 0; at < triangles.length; at += 3) {
    const [a, b, c] = [3 * triangles[at], 3 * triangles[at + 1], 3 * triangles[at + 2]];
    const [ux, uy, uz, vx, vy, vz] = [b, c].flatMap(end => [0, 1, 2].map(axis => points[end + axis] - points[a + axis]));
    const normal = [uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx];
    area += Math.hypot(...normal) / 2;
    for (let axis = 0; axis < 3; axis++) {
      volume += points[a + axis] * normal[axis] / 6;
      for (const corner of [a, b, c]) normals[corner + axis] += normal[axis];
    }
  }
  return { volume, area, normals };
}

/** Moves a surface along its normals until it encloses a volume in mm³: smoothing has made thin parts thinner. */
function filled(body, wanted) {
  for (let round = 0; round < 3; round++) {
    const { volume, area, normals } = measured(body), sign = Math.sign(volume), move = (wanted - Math.abs(volume)) / area;
    for (let at = 0; at < normals.length; at += 3) {
      const length = Math.hypot(normals[at], normals[at + 1], normals[at + 2]) || 1;
      for (let axis = 0; axis < 3; axis++) body.points[at + axis] += sign * move * normals[at + axis] / length;
    }
  }
  return Math.abs(measured(body).volume);
}

/** Tiles of the views in a width and a height: [view, left, top, width, height, whether it shows the layer beside]. */
function arrangement(view, width, height, beside) {
  if (view !== ALL) {
    if (view === SOLID || !beside) return [[view, 0, 0, width, height, false]];
    return width > height ? [[view, 0, 0, width / 2, height, true], [view, width / 2, 0, width / 2, height, false]]
      : [[view, 0, 0, width, height / 2, true], [view, 0, height / 2, width, height / 2, false]];
  }
  if (width > 1.25 * height) {
    const slice = Math.min(beside ? 0.36 * width : 0.5 * width, 0.86 * height), left = beside ? 2 * slice : slice;
    const rest = width - left, upper = 0.6 * height;
    return [...(beside ? [[AXIAL, 0, 0, slice, height, true]] : []), [AXIAL, left - slice, 0, slice, height, false],
      [SOLID, left, 0, rest, upper, false], [CORONAL, left, upper, rest / 2, height - upper, false],
      [SAGITTAL, left + rest / 2, upper, rest / 2, height - upper, false]];
  }
  const half = width / 2, rows = beside ? 3 : 2, row = height / rows, last = height - row;
  return beside
    ? [[AXIAL, 0, 0, half, row, true], [AXIAL, half, 0, half, row, false], [SOLID, 0, row, width, row, false],
      [CORONAL, 0, last, half, row, false], [SAGITTAL, half, last, half, row, false]]
    : [[AXIAL, 0, 0, half, row, false], [SOLID, half, 0, half, row, false],
      [CORONAL, 0, last, half, row, false], [SAGITTAL, half, last, half, row, false]];
}

/** Adds all this to a NiiVue whose first volume is the scan and whose second one is the overlay.
 *
 * `state()` returns what is shown now: patient, layer, modality, low and high (intensities of the values 10 and 255),
 * start (first voxel of the box), names (of the overlay's values), and beside: null, or the values, colours and name
 * of the layer shown beside, and whether it stands left. */
function dress(nv, NVMesh, state) {
  const canvas = nv.canvas, box = canvas.parentElement;
  Object.assign(box.style, { position: "relative", overflow: "hidden", background: "black" });
  const over = element("canvas", box, {}, "position:absolute;inset:0;width:100%;height:100%;pointer-events:none");
  const bar = element("div", box, { className: "fedlab-tools" }, `position:absolute;left:0;right:0;bottom:0;display:flex;
    flex-wrap:wrap;align-items:center;gap:2px 12px;padding:3px 8px;background:#000;color:#ddd;font:12px/1.6 sans-serif`);
  const said = element("span", bar, { className: "fedlab-cursor" }, "flex:1 1 15em;min-height:1.6em");
  const [width, level] = ["window", "level"].map(name => {
    const label = element("label", bar, { textContent: `${name} ` }, "display:flex;align-items:center;gap:4px");
    const slider = element("input", label, { type: "range", min: name === "window" ? 8 : 0, max: 255, className: `fedlab-${name}` },
      "width:84px;margin:0;accent-color:#7fd4ff");
    slider.value = name === "window" ? 255 : 127;
    return slider;
  });
  const contrast = element("span", bar, { className: "fedlab-contrast" }, "min-width:6.5em");
  const button = (text, act) => {
    const made = element("button", bar, { type: "button", textContent: text, onclick: act },
      "font:inherit;color:#ddd;background:#222;border:1px solid #666;border-radius:4px;padding:0 8px;cursor:pointer");
    return made;
  };
  button("Full screen", () => document.fullscreenElement ? document.exitFullscreen()
    : (box.closest(".fedlab-viewer") ?? box).requestFullscreen());
  button("Save picture", save);
  // When JupyterLab changes its theme the canvas has no size for a moment. NiiVue may be left with that size, on a busy
  // machine also after the last change of size that an observer is told of.
  const settle = () => setTimeout(() => {
    if (canvas.width || !canvas.isConnected) return;
    if (canvas.clientWidth) nv.resizeListener();
    else settle();
  }, 200);
  new ResizeObserver(settle).observe(canvas);
  new MutationObserver(settle).observe(canvas, { attributes: true, attributeFilter: ["width", "height"] });

  Object.assign(nv.opts, {
    isOrientationTextVisible: false, show3Dcrosshair: false, meshThicknessOn2D: 0, isRadiologicalConvention: true,
    sagittalNoseLeft: true, isColorbar: false, dragAndDropEnabled: false,
    crosshairWidth: 0 });  // lines of one pixel are drawn over the slices
  Object.assign(nv.scene, { renderAzimuth: 215, renderElevation: 22, volScaleMultiplier: 1.28 });
  nv.drawImage3D = () => {};  // surfaces are drawn instead: without a GPU, casting rays takes seconds per picture
  const shader = nv.setCustomMeshShader(SHADER, "fedlab");
  let tiles = [], seen = {}, busy = false, asked = 0;

  /** Intensity of a value from 0 to 255. */
  const intensity = value => { const { low, high } = state(); return low + (value - 10) / 245 * (high - low); };
  const digits = value => Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(3);

  const draw2D = nv.draw2D, drawSceneCore = nv.drawSceneCore, refreshLayers = nv.refreshLayers, update = nv.updateGLVolume;
  const bind = texture => { nv.gl.activeTexture(nv.gl.TEXTURE2); nv.gl.bindTexture(nv.gl.TEXTURE_3D, texture); };
  nv.draw2D = (...where) => {
    const beside = tiles[nv.screenSlices.length]?.[5];
    if (beside) bind(seen.texture);
    draw2D.apply(nv, where);
    if (beside) bind(nv.overlayTexture);
  };
  nv.drawSceneCore = () => {
    if (busy || !nv.back || !canvas.width) return;
    const scale = canvas.width / (canvas.clientWidth || canvas.width), high = canvas.height / scale - bar.offsetHeight;
    tiles = arrangement(nv.opts.sliceType, canvas.width / scale, high, Boolean(seen.texture));
    if (seen.texture && tiles.length > 1 && !state().beside?.left) [tiles[0][5], tiles[1][5]] = [false, true];
    nv.customLayout = tiles.map(([sliceType, x, y, w, h]) => ({
      sliceType, position: [x * scale / canvas.width, y * scale / canvas.height, w * scale / canvas.width, h * scale / canvas.height] }));
    drawSceneCore.call(nv);
    mark(scale);
  };
  nv.refreshLayers = (volume, layer) => {  // uploading an unchanged scan again would take most of the time
    const { img, cal_min, cal_max, colormap, opacity } = volume, now = [img, cal_min, cal_max, colormap, opacity];
    if (layer === 0 && seen.scan?.every((value, at) => value === now[at])) return;
    if (layer === 0) seen.scan = now;
    refreshLayers.call(nv, volume, layer);
  };
  nv.updateGLVolume = () => {
    busy = true;
    update.call(nv);
    busy = false;
    besides();
    bodies();
    const [scan] = nv.volumes;
    if (scan) {
      [width.value, level.value] = [scan.cal_max - scan.cal_min, (scan.cal_max + scan.cal_min) / 2];
      contrast.textContent = `${digits(intensity(scan.cal_min))} to ${digits(intensity(scan.cal_max))}`;
    }
    nv.drawScene();
    tell(nv.scene.crosshairPos);
  };

  /** The texture of the layer shown beside. */
  function besides() {
    const { beside } = state(), gl = nv.gl;
    if (!beside || beside.values.length !== nv.back?.dimsRAS.slice(1, 4).reduce((size, side) => size * side)) {
      seen.texture = null;
      return;
    }
    const lut = beside.colours.join();
    if (seen.texture && seen.beside === beside.values && seen.lut === lut) return;
    const [, nx, ny, nz] = nv.back.dimsRAS, colours = new Uint32Array(Uint8Array.from(beside.colours).buffer);
    const pixels = Uint32Array.from(beside.values, value => colours[value] ?? 0);
    seen.texture = nv.rgbaTex(seen.texture, gl.TEXTURE2, [3, nx, ny, nz]);
    gl.texSubImage3D(gl.TEXTURE_3D, 0, 0, 0, 0, nx, ny, nz, gl.RGBA, gl.UNSIGNED_BYTE, new Uint8Array(pixels.buffer));
    bind(nv.overlayTexture);
    Object.assign(seen, { beside: beside.values, lut });
  }

  /** Surfaces of the overlay's values and of the brain: hidden, coloured or, if the voxels changed, made anew. */
  function bodies() {
    const [scan, overlay] = nv.volumes;
    if (!overlay) return;
    if (seen.voxels !== overlay.img || seen.head !== nv.back) {
      seen.voxels = overlay.img;
      const turn = ++asked;
      requestAnimationFrame(() => setTimeout(() => {  // the slices are shown first
        if (turn !== asked) return;
        make(scan, overlay);
        show(overlay);
        nv.drawScene();
      }));
    }
    show(overlay);
  }
  function show(overlay) {
    const lut = overlay.colormapLabel?.lut ?? [];
    for (const mesh of nv.meshes) {
      if (mesh.name === "brain") continue;
      const [red, green, blue, alpha] = lut.slice(4 * mesh.value, 4 * mesh.value + 4), colour = [red, green, blue, 255];
      mesh.visible = alpha > 0 && overlay.opacity > 0;
      if (mesh.visible && colour.some((value, at) => value !== mesh.rgba255[at])) {
        mesh.rgba255 = Uint8Array.from(colour);
        mesh.updateMesh(nv.gl);
      }
    }
  }
  function make(scan, overlay) {
    const dims = nv.back.dimsRAS.slice(1, 4), { affine } = scan.hdr;
    const keep = seen.head === nv.back && nv.meshes.find(mesh => mesh.name === "brain");
    const build = (name, cut, colour, opacity) => {
      const body = surface(cut), voxels = body.points;
      body.points = voxels.map((_, at) => {
        const [x, y, z, shift] = affine[at % 3], from = at - at % 3;
        return x * voxels[from] + y * voxels[from + 1] + z * voxels[from + 2] + shift;
      });
      const volume = filled(body, cut.count * nv.back.pixDimsRAS[1] * nv.back.pixDimsRAS[2] * nv.back.pixDimsRAS[3]);
      const mesh = new NVMesh(body.points, body.triangles, name, colour(voxels), opacity, true, nv.gl);
      Object.assign(mesh, { meshShaderIndex: shader, millilitres: volume / 1000 });
      mesh.updateMesh(nv.gl);
      return mesh;
    };
    for (const mesh of nv.meshes) if (mesh !== keep) mesh.unloadMesh(nv.gl);
    nv.meshes = [];
    for (let value = 1; value < 5; value++) {
      const wanted = new Uint8Array(256);
      wanted[value] = 1;
      const cut = cutOut(overlay.img, dims, wanted, TUMOUR_CELLS);
      if (cut) nv.meshes.push(Object.assign(build(`part ${value}`, cut, () => new Uint8Array([0, 0, 0, 255]), 1), { value }));
    }
    const head = keep || cutOut(scan.img, dims, new Uint8Array(256).fill(1, 1), BRAIN_CELLS);
    if (head) nv.meshes.push(keep || build("brain", head, voxels => cortex(scan.img, dims, voxels), 0.5));
    seen.head = nv.back;
    canvas.dataset.millilitres = JSON.stringify(Object.fromEntries(nv.meshes.map(mesh => [mesh.value ?? 0, mesh.millilitres])));
  }

  nv.onLocationChange = (report => location => { report?.(location); tell(location.frac); })(nv.onLocationChange);
  canvas.addEventListener("mousemove", event => {
    const frac = nv.canvasPos2frac([event.offsetX * nv.uiData.dpr, event.offsetY * nv.uiData.dpr]);
    tell(frac[0] >= 0 ? frac : nv.scene.crosshairPos);
  });
  /** Writes millimetres, intensity and label at a place, given in fractions of the box. */
  function tell(frac) {
    const [scan, overlay] = nv.volumes, { modality, names, patient } = state();
    if (!scan || !nv.back) return;
    const dims = nv.back.dimsRAS, [x, y, z] = [0, 1, 2].map(axis => Math.min(Math.max(Math.floor(frac[axis] * dims[axis + 1]), 0), dims[axis + 1] - 1));
    const at = x + dims[1] * (y + dims[2] * z), mm = nv.frac2mm(frac), value = scan.img[at];
    const side = (letters, coordinate) => `${letters[coordinate < 0 ? 1 : 0]} ${Math.abs(coordinate).toFixed(1)}`;
    const place = [side("RL", mm[0]), side("AP", mm[1]), side("SI", mm[2])].join("  ");
    said.textContent = `${patient}   ${place} mm   ${modality} ${value ? digits(intensity(value)) : "outside"}   ${names[overlay?.img[at]] ?? ""}`;
  }

  let waiting = 0;
  for (const slider of [width, level]) slider.addEventListener("input", () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(() => {
      const half = width.value / 2, [scan] = nv.volumes;
      [scan.cal_min, scan.cal_max] = [level.value - half, Number(level.value) + half];
      nv.updateGLVolume();
    });
  });

  /** Draws names and orientation over the views. */
  function mark(scale) {
    [over.width, over.height] = [canvas.width, canvas.height];
    const pen = over.getContext("2d"), { layer, beside, start, patient } = state();
    pen.scale(scale, scale);
    Object.assign(pen, { lineWidth: 3, strokeStyle: "rgba(0,0,0,.75)", lineJoin: "round", textBaseline: "middle" });
    const write = (text, x, y, align, weight = "bold ", fill = "#fff") => {
      Object.assign(pen, { font: `${weight}12px sans-serif`, textAlign: align, fillStyle: fill });
      pen.strokeText(text, x, y);
      pen.fillText(text, x, y);
    };
    const places = [];
    tiles.forEach(([view, x, y, w, h, other], number) => {
      const dim = nv.back.dimsRAS, axis = { [AXIAL]: 2, [CORONAL]: 1, [SAGITTAL]: 0 }[view];
      const slice = axis === undefined ? "" : ` ${Math.min(Math.floor(nv.scene.crosshairPos[axis] * dim[axis + 1]), dim[axis + 1] - 1) + start[axis]}`;
      const whose = view === AXIAL || tiles.length < 3 ? other ? beside?.name : layer : "";
      places.push({ view: NAMES[view], beside: other, left: x, top: y, width: w, height: h });
      pen.save();
      pen.beginPath();
      pen.rect(x, y, w, h);
      pen.clip();
      if (whose) write(whose, x + 6, y + 11, "left");
      const name = NAMES[view] + slice, long = 6 + 7 * name.length > w / 2 - 10;  // too long beside the letter below
      write(name, x + 6, y + h - (long ? 25 : 10), "left", "", "#ddd");
      if (view === SOLID) solid(write, nv.screenSlices[number], scale);
      else {
        const [left, right, up, down] = SIDES[view];
        lines(pen, nv.screenSlices[number], view, scale);
        write(left, x + 6, y + h / 2, "left");
        write(right, x + w - 6, y + h / 2, "right");
        write(up, x + w / 2, y + 11, "center");
        write(down, x + w / 2, y + h - 10, "center");
      }
      pen.restore();
      pen.fillStyle = "#444";
      if (x) pen.fillRect(x, y, 1, h);
      if (y) pen.fillRect(x, y, w, 1);
    });
    canvas.dataset.tiles = JSON.stringify(places);
  }
  /** The crosshair in a slice; the patient's right or face is on the left. */
  function lines(pen, tile, view, scale) {
    if (!tile) return;
    const [left, top, w, h] = tile.leftTopWidthHeight.map(value => value / scale), [fx, fy, fz] = nv.scene.crosshairPos;
    pen.fillStyle = "rgba(127,212,255,.8)";
    pen.fillRect(Math.round(left + w * (1 - (view === SAGITTAL ? fy : fx))), top, 1, h);
    pen.fillRect(left, Math.round(top + h * (1 - (view === AXIAL ? fy : fz))), w, 1);
  }
  /** The six directions around the brain; those towards and away from the viewer are left out. */
  function solid(write, tile, scale) {
    if (!tile) return;
    const [left, top, w, h] = tile.leftTopWidthHeight.map(value => value / scale);
    const [mvp] = nv.calculateMvpMatrix(null, tile.leftTopWidthHeight, nv.scene.renderAzimuth, nv.scene.renderElevation);
    const project = ([x, y, z]) => [left + w * (1 + mvp[0] * x + mvp[4] * y + mvp[8] * z + mvp[12]) / 2,
      top + h * (1 - mvp[1] * x - mvp[5] * y - mvp[9] * z - mvp[13]) / 2];
    const middle = nv.pivot3D, reach = middle.map((value, axis) => nv.extentsMax[axis] - value), [cx, cy] = project(middle);
    const perMillimetre = w / 2 * Math.hypot(mvp[0], mvp[4], mvp[8]);
    ["RL", "AP", "SI"].forEach((letters, axis) => [0, 1].forEach(end => {
      const place = middle.map((value, other) => value + (other === axis ? (end ? -1 : 1) * (reach[axis] + 6) : 0));
      const [x, y] = project(place);
      if (Math.hypot(x - cx, y - cy) > 0.71 * perMillimetre * (reach[axis] + 6))
        write(letters[end], Math.min(Math.max(x, left + 8), left + w - 8), Math.min(Math.max(y, top + 10), top + h - 22), "center");
    }));
  }

  function save() {
    nv.drawScene();  // the pixels of a WebGL canvas last until the browser has shown them
    const sheet = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height - bar.offsetHeight * nv.uiData.dpr });
    for (const part of [canvas, over]) sheet.getContext("2d").drawImage(part, 0, 0);
    sheet.toBlob(blob => {
      const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: `${state().patient}.png` });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    });
  }
}

/** Greys of the brain's surface: the scan a few voxels below each vertex, so that folds can be seen. */
function cortex(scan, [nx, ny, nz], points) {
  const colours = new Uint8Array(points.length / 3 * 4).fill(255), centre = [nx / 2, ny / 2, nz / 2];
  for (let at = 0, to = 0; at < points.length; at += 3, to += 4) {
    let sum = 0;
    for (const depth of [0.04, 0.07]) {
      const [x, y, z] = centre.map((middle, axis) => Math.round(points[at + axis] + depth * (middle - points[at + axis])));
      sum += scan[x + nx * (y + ny * z)] ?? 0;
    }
    colours.fill(Math.min(255, 70 + sum / 2), to, to + 3);
  }
  return colours;
}
