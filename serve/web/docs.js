// Swagger UI over the service's own description; a key entered on the page at `/` is sent here too.

import { key } from "./service.js";

window.SwaggerUIBundle({
  url: "openapi.json",
  domNode: document.getElementById("docs"),
  deepLinking: true,
  defaultModelsExpandDepth: 0,
  validatorUrl: null,
  syntaxHighlight: { theme: "agate" },
  requestInterceptor: request => {
    if (key.get() && !request.headers["X-API-Key"] && !request.headers.Authorization) request.headers["X-API-Key"] = key.get();
    return request;
  },
});
