// The canvas of a notebook: ipyniivue's widget `inner`, sending less and drawing once. `dress` is that of viewer.js.

/** Keeps the voxels, which came from the kernel, from being sent back to it. */
async function keepVoxels(model) {
  for (const place of model.get("volumes")) {
    const volume = await model.widget_manager.get_model(place.replace("IPY_MODEL_", ""));
    const send = volume.send_sync_message;
    volume.send_sync_message = (state, ...more) =>
      Object.keys(state).some(name => name.startsWith("chunk_")) ? "" : send.call(volume, state, ...more);
  }
}

return {
  initialize: context => inner.initialize(context),
  async render(context) {
    const { model } = context, nv = instance();
    if (nv.canvas) return inner.render(context);  // shown in another place
    await keepVoxels(model);
    let beside = null;
    const unpack = async () => {
      const packed = model.get("beside");
      beside = packed.byteLength ? new Uint8Array(await new Response(
        new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer()) : null;
    };
    await unpack();
    const update = nv.updateGLVolume;
    nv.updateGLVolume = () => {};  // ipyniivue draws everything anew for each volume; here once, at the end
    const leave = await inner.render(context);
    while (!nv.initialized) await new Promise(resolve => setTimeout(resolve, 5));
    nv.updateGLVolume = update;
    dress(nv, NVMesh, () => {
      const shown = model.get("shown");
      return { ...shown, beside: beside && shown.beside && { ...shown.beside, values: beside } };
    });
    model.on("change:beside", () => unpack().then(() => nv.updateGLVolume()));
    model.on("change:shown", () => nv.updateGLVolume());
    nv.updateGLVolume();
    return leave;
  },
};
