// Browsers start no workers for a page that was opened as a file. Search needs one, so there its
// script runs in a hidden frame instead, behind the same interface.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.append(this.frame)
      const scope = this.frame.contentWindow
      const load = (source) => new Promise((resolve, reject) => {
        const script = scope.document.createElement("script")
        Object.assign(script, { src: source, onload: resolve, onerror: reject })
        scope.document.body.append(script)
      })
      scope.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
      scope.importScripts = (...urls) =>
        urls.reduce((before, each) => before.then(() => load(each)), Promise.resolve())
      this.loaded = load(url)
    }

    postMessage(data) {
      const scope = this.frame.contentWindow
      this.loaded.then(() => scope.dispatchEvent(new scope.MessageEvent("message", { data })))
    }

    terminate() {
      this.frame.remove()
    }
  }
}
