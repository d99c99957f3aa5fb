// The Python module: how launches are run, and what they did. The operations are torch.ops.cbam_fused_simt.*,
// registered when the module is loaded.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "runtime/device.h"
#include "runtime/global_memory.h"
#include "runtime/launch.h"
#include "runtime/reuse.h"
#include "runtime/settings.h"

namespace py = pybind11;

namespace {

simt::Order order_named(const std::string& name) {
  if (name == "ascending") return simt::Order::kAscending;
  if (name == "descending") return simt::Order::kDescending;
  if (name == "random") return simt::Order::kRandom;
  throw std::invalid_argument("order must be ascending, descending or random; got " + name);
}

void configure(const std::string& order, uint64_t seed, unsigned resident, bool count_sectors, bool count_reuse,
               uint8_t fill, unsigned repeat) {
  simt::settings = {order_named(order), seed, resident, count_sectors, count_reuse, fill, repeat};
}

void reset() {
  simt::reset_traffic();
  simt::reset_launches();
  simt::reset_reuse();
  simt::forget_announced();
}

}  // namespace

PYBIND11_MODULE(simt_kernels, m) {
  py::class_<simt::Traffic>(m, "Traffic", py::module_local(),
                            "Bytes of one tensor, and sectors of 32 bytes, as warps requested them.")
      .def_readonly("loaded", &simt::Traffic::loaded)
      .def_readonly("stored", &simt::Traffic::stored)
      .def_readonly("loaded_sectors", &simt::Traffic::loaded_sectors)
      .def_readonly("stored_sectors", &simt::Traffic::stored_sectors);
  py::class_<simt::LaunchRecord>(m, "Launch", py::module_local())
      .def_readonly("kernel", &simt::LaunchRecord::kernel)
      .def_readonly("blocks", &simt::LaunchRecord::blocks)
      .def_readonly("threads", &simt::LaunchRecord::threads)
      .def_readonly("cluster", &simt::LaunchRecord::cluster)
      .def_readonly("dynamic_bytes", &simt::LaunchRecord::dynamic_bytes);
  m.def("configure", &configure, py::kw_only(), py::arg("order") = "ascending", py::arg("seed") = 0,
        py::arg("resident") = 1, py::arg("count_sectors") = false, py::arg("count_reuse") = false,
        py::arg("fill") = 0xff, py::arg("repeat") = 1,
        "How launches are run from now on; runtime/settings.h says what is what.");
  const simt::Device usual;
  m.def(
      "device",
      [](int capability, int multiprocessors, int l2_bytes, int shared_bytes, int block_shared_bytes, int clusters) {
        simt::device = {capability, multiprocessors, l2_bytes, shared_bytes, block_shared_bytes, clusters};
      },
      py::kw_only(), py::arg("capability") = usual.capability, py::arg("multiprocessors") = usual.multiprocessors,
      py::arg("l2_bytes") = usual.l2_bytes, py::arg("shared_bytes") = usual.shared_bytes,
      py::arg("block_shared_bytes") = usual.block_shared_bytes, py::arg("clusters") = usual.clusters,
      "What operations that ask are told of the device.");
  m.def("traffic", &simt::traffic, "By name of the tensor, since the last reset.");
  m.def("reuse", &simt::reuse,
        "By name of the tensor, since the last reset: the bytes that were touched between two uses of a sector of it, "
        "at most; runtime/reuse.h says more.");
  m.def("launches", &simt::launches, "Since the last reset, in order.");
  m.def("reset", &reset, "Forgets what was counted.");
}
