// Browsers do not start a worker for a page that is opened from a folder. Run the worker of the search in a hidden
// frame instead. The plugin `offline` loads a script with this name from the network if there is none here.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.window = frame.contentWindow;
      addEventListener("message", ({ source, data }) => {
        if (source === this.window) this.dispatchEvent(new MessageEvent("message", { data }));
      });
      const page = this.window.document;
      page.open();
      page.write(`<body><script>postMessage = (data) => parent.postMessage(data, "*");</script>`);
      page.write(`<script src="${url}"></script>`);
      page.close();
      this.loaded = new Promise((resolve) => (this.window.onload = resolve));
    }

    async postMessage(data) {
      await this.loaded;
      this.window.dispatchEvent(new MessageEvent("message", { data }));
    }
  };
}
