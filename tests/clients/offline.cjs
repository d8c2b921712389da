// Preloaded into Node programs: names of other machines are not looked up. `cn` asks its maker for the newest version
// whenever it starts, with an id of the machine, and no setting keeps it from that.
const dns = require("dns");
const { lookup } = dns;
dns.lookup = (host, ...rest) => {
  if (/^(localhost|127\.[\d.]+|::1)$/.test(host)) return lookup(host, ...rest);
  process.nextTick(rest.at(-1), Object.assign(new Error(`${host} is not looked up here`), { code: "ENOTFOUND" }));
};
