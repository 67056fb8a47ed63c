// A CUDA device made of this machine's memory, for tests where there is no GPU.
//
// Tensors on it are plain ones whose storage says "cuda:0" and lies in ordinary memory. Whatever
// PyTorch would have a CUDA kernel for is computed by the CPU's on the same memory. What a program
// can get wrong on a real device shows here too: operands on different devices, reading memory
// that only the other side has, waiting for the device while a graph is being captured, a graph
// that is replayed after its inputs have moved. Numbers and times are a CPU's.
#include <optional>

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/set_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <set>
#include <string>
#include <vector>

using at::Tensor;
using c10::Device;
using c10::IValue;
using torch::jit::Stack;

namespace {

const Device GPU(c10::DeviceType::CUDA, 0);

// --- memory -------------------------------------------------------------------------------------

std::atomic<int64_t> allocated{0}, peak{0}, limit{INT64_MAX};

void count(int64_t bytes) {
  TORCH_CHECK_WITH(OutOfMemoryError, bytes <= 0 || allocated + bytes <= limit,
                   "CUDA out of memory. Tried to allocate ", bytes, " bytes of ", limit.load());
  const int64_t now = allocated += bytes;
  int64_t before = peak;
  while (now > before && !peak.compare_exchange_weak(before, now)) {}
}

struct Memory {  // what a storage on the device really is: a tensor of the CPU
  Tensor owner;
  int64_t bytes;
  Memory(Tensor tensor, int64_t size) : owner(std::move(tensor)), bytes(size) { count(bytes); }
  ~Memory() { count(-bytes); }
};

c10::DataPtr on_gpu(const Tensor& owner) {
  auto* memory = new Memory(owner, static_cast<int64_t>(owner.storage().nbytes()));
  return {owner.storage().mutable_data(), memory,
          [](void* context) { delete static_cast<Memory*>(context); }, GPU};
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    return on_gpu(at::empty({static_cast<int64_t>(bytes)}, at::kByte));
  }
  void copy_data(void* target, const void* source, size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }
};
Allocator allocator;
REGISTER_ALLOCATOR(c10::DeviceType::CUDA, &allocator)

Tensor wrapped(const c10::Storage& storage, const Tensor& like, c10::DispatchKey key) {
  Tensor made = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(
      like.sizes(), like.strides(), like.storage_offset());
  return made;
}

Tensor to_gpu(const Tensor& cpu) {  // the same memory; the CPU's tensor is not used any more
  c10::Storage storage(c10::Storage::use_byte_size_t(), cpu.storage().nbytes(), on_gpu(cpu),
                       &allocator, true);
  return wrapped(storage, cpu, c10::DispatchKey::CUDA);
}

Tensor to_cpu(const Tensor& gpu) {  // the same memory, kept alive
  auto* owner = new c10::Storage(gpu.storage());
  c10::DataPtr data(const_cast<void*>(gpu.storage().data()), owner,
                    [](void* context) { delete static_cast<c10::Storage*>(context); },
                    c10::kCPU);
  c10::Storage storage(c10::Storage::use_byte_size_t(), gpu.storage().nbytes(), std::move(data),
                       c10::GetAllocator(c10::kCPU), true);
  return wrapped(storage, gpu, c10::DispatchKey::CPU);
}

// --- operations ---------------------------------------------------------------------------------

bool is_on_gpu(const Tensor& tensor) { return tensor.defined() && tensor.device() == GPU; }

template <class Change>
IValue changed(const IValue& value, const Change& change) {  // every tensor in it
  if (value.isTensor()) return value.toTensor().defined() ? IValue(change(value.toTensor())) : value;
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor tensor : value.toTensorList()) list.push_back(tensor.defined() ? change(tensor) : tensor);
    return list;
  }
  if (value.isList()) {
    auto list = value.toList().copy();
    for (size_t i = 0; i < list.size(); ++i)
      if (const IValue item = list.get(i); item.isTensor() && item.toTensor().defined())
        list.set(i, change(item.toTensor()));
    return list;
  }
  if (value.isDevice() && value.toDevice().is_cuda()) return Device(c10::kCPU);
  return value;
}

struct Recorded {
  c10::OperatorHandle op;
  Stack arguments, results;
};
std::vector<std::vector<Recorded>> graphs;
int capturing = -1;
int64_t launched = 0;

const std::set<std::string> WAITS = {  // for the device, which a capture forbids
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal",
    "aten::_unique2", "aten::unique_dim", "aten::is_nonzero", "aten::repeat_interleave.Tensor"};
const std::set<std::string> MIXED = {  // take operands of the CPU beside the device's
    "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"};

std::string full_name(const c10::OperatorHandle& op) {
  const auto& name = op.operator_name();
  return name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
}

void refuse_in_capture(const std::string& what) {
  TORCH_CHECK(capturing < 0, "CUDA error: operation not permitted when stream is capturing: ", what);
}

// Run `op` on the memory of `arguments`; results that are new lie on the device.
Stack computed(const c10::OperatorHandle& op, const Stack& arguments) {
  std::vector<std::pair<Tensor, Tensor>> aliases;  // on the device, on the CPU
  const bool mixes = MIXED.count(op.operator_name().name) > 0;
  bool asks_for_gpu = false;
  for (const IValue& value : arguments) asks_for_gpu |= value.isDevice() && value.toDevice().is_cuda();
  const auto aliased = [&](const Tensor& tensor) {
    if (!is_on_gpu(tensor)) {
      TORCH_CHECK(tensor.dim() == 0 || mixes || asks_for_gpu,
                  "Expected all tensors to be on the same device, but found at least two devices, "
                  "cuda:0 and ", tensor.device(), "! (", full_name(op), ")");
      return tensor;
    }
    for (const auto& [gpu, cpu] : aliases)
      if (gpu.is_same(tensor)) return cpu;
    aliases.emplace_back(tensor, to_cpu(tensor));
    return aliases.back().second;
  };
  Stack stack;
  for (const IValue& value : arguments) stack.push_back(changed(value, aliased));
  op.callBoxed(stack);
  for (auto& [gpu, cpu] : aliases) {  // an output that had to grow
    if (gpu.sizes() == cpu.sizes() && gpu.storage().data() == cpu.storage().data()) continue;
    const Tensor grown = to_gpu(cpu);
    gpu.unsafeGetTensorImpl()->set_storage_keep_dtype(grown.storage());
    gpu.unsafeGetTensorImpl()->set_sizes_and_strides(
        cpu.sizes(), cpu.strides(), cpu.storage_offset());
  }
  const auto returned = [&](const Tensor& tensor) {
    if (is_on_gpu(tensor)) return tensor;
    for (const auto& [gpu, cpu] : aliases) {
      if (cpu.is_same(tensor)) return gpu;
      if (cpu.storage().data() == tensor.storage().data() && tensor.storage().nbytes() > 0)
        return wrapped(gpu.storage(), tensor, c10::DispatchKey::CUDA);
    }
    return to_gpu(tensor);
  };
  for (IValue& value : stack) value = changed(value, returned);
  return stack;
}

void fallback(const c10::OperatorHandle& op, Stack* stack) {
  const std::string name = full_name(op);
  if (WAITS.count(name)) refuse_in_capture(name);
  const size_t count_of_arguments = op.schema().arguments().size();
  const Stack arguments(stack->end() - count_of_arguments, stack->end());
  Stack results = computed(op, arguments);
  ++launched;
  if (capturing >= 0) graphs[capturing].push_back({op, arguments, results});
  torch::jit::drop(*stack, count_of_arguments);
  stack->insert(stack->end(), results.begin(), results.end());
}

Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  if (self.device() != source.device()) {
    refuse_in_capture("copy between devices");
  }
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", "");
  const Tensor to = is_on_gpu(self) ? to_cpu(self) : self;
  to.copy_(is_on_gpu(source) ? to_cpu(source) : source);
  ++launched;
  if (capturing >= 0) graphs[capturing].push_back({op, {self, source, non_blocking}, {self}});
  return self;
}

void replay(int number) {
  for (const Recorded& one : graphs.at(number)) {
    if (full_name(one.op) == "aten::copy_") {
      to_cpu(one.arguments[0].toTensor()).copy_(to_cpu(one.arguments[1].toTensor()));
      continue;
    }
    const Stack results = computed(one.op, one.arguments);
    for (size_t i = 0; i < results.size(); ++i) {
      const auto put = [](const Tensor& target, const Tensor& value) {
        if (is_on_gpu(target) && !target.is_same(value)) to_cpu(target).copy_(to_cpu(value));
      };
      if (results[i].isTensor()) {
        put(one.results[i].toTensor(), results[i].toTensor());
      } else if (results[i].isTensorList()) {
        const auto targets = one.results[i].toTensorVector(), values = results[i].toTensorVector();
        for (size_t j = 0; j < values.size(); ++j) put(targets[j], values[j]);
      }
    }
  }
}

// --- what has to be there for a device, whatever it computes --------------------------------------

Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype,
             std::optional<at::Layout>, std::optional<Device>, std::optional<bool>,
             std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &allocator,
                                   c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                     std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                           &allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                           c10::dtype_or_default(dtype));
}

Tensor as_strided(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                  std::optional<c10::SymInt> offset) {
  return at::native::as_strided_tensorimpl(
      self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
      offset ? std::optional<int64_t>(offset->guard_int(__FILE__, __LINE__)) : std::nullopt);
}

Tensor view(const Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

Tensor reshape_alias(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor& set_(Tensor& self, at::Storage source) {
  const auto size = static_cast<int64_t>(source.nbytes() / self.dtype().itemsize());
  return at::native::set_storage_cpu_(self, std::move(source), 0, {size}, {});
}

Tensor& set_at(Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
               c10::SymIntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(source), offset.guard_int(__FILE__, __LINE__),
                                      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

// No fused attention here: 0 is the plain one, which is made of other operations.
int64_t fused_sdp_choice(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&,
                         double, bool, std::optional<double>, bool) {
  return 0;
}

// Products with a wider result, which only GPUs have.
Tensor wide_mm(const Tensor& a, const Tensor& b, at::ScalarType dtype) {
  return at::mm(a.to(dtype), b.to(dtype));
}

Tensor& wide_mm_out(const Tensor& a, const Tensor& b, at::ScalarType dtype, Tensor& out) {
  return out.copy_(wide_mm(a, b, dtype));
}

Tensor wide_addmm(const Tensor& self, const Tensor& a, const Tensor& b, at::ScalarType dtype,
             const at::Scalar& beta, const at::Scalar& alpha) {
  return at::addmm(self.to(dtype), a.to(dtype), b.to(dtype), beta, alpha);
}

Tensor& wide_addmm_out(const Tensor& self, const Tensor& a, const Tensor& b, at::ScalarType dtype,
                  const at::Scalar& beta, const at::Scalar& alpha, Tensor& out) {
  return out.copy_(wide_addmm(self, a, b, dtype, beta, alpha));
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = c10::DeviceType::CUDA;
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::DeviceType type() const override { return static_type; }
  Device exchangeDevice(Device) const override { return GPU; }
  Device getDevice() const override { return GPU; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device) const override { return c10::Stream(c10::Stream::DEFAULT, GPU); }
  c10::Stream getDefaultStream(Device) const override { return getStream(GPU); }
  c10::Stream exchangeStream(c10::Stream) const override { return getStream(GPU); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool hasCUDA() const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  int getNumGPUs() const override { return 1; }
  bool isPinnedPtr(const void*) const override { return false; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::kCPU); }
};

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("copy_", copy_);
  m.impl("set_.source_Storage", set_);
  m.impl("set_.source_Storage_storage_offset", set_at);
  m.impl("_fused_sdp_choice", fused_sdp_choice);
  m.impl("mm.dtype", wide_mm);
  m.impl("mm.dtype_out", wide_mm_out);
  m.impl("addmm.dtype", wide_addmm);
  m.impl("addmm.dtype_out", wide_addmm_out);
}

}  // namespace

namespace at {
using EmulatedHooks = Hooks;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, EmulatedHooks)
namespace accelerator {  // a PyTorch built for the CPU says that there is none; this is asked first
__attribute__((visibility("default"))) std::optional<c10::DeviceType> getAccelerator(bool) {
  return c10::DeviceType::CUDA;
}
}  // namespace accelerator
}  // namespace at

extern "C" {
int64_t allocated_bytes() { return allocated; }
int64_t peak_bytes() { return peak; }
void set_limit(int64_t bytes) { limit = bytes; }
void forget_peak() { peak = allocated.load(); }
int64_t launches() { return launched; }
int begin_capture() {
  graphs.emplace_back();
  return capturing = static_cast<int>(graphs.size()) - 1;
}
void end_capture() { capturing = -1; }
bool is_capturing() { return capturing >= 0; }
void replay_graph(int number) { replay(number); }
void drop_graph(int number) { graphs.at(number).clear(); }
}
