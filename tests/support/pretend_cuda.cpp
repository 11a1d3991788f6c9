// CUDA devices without a GPU: tensors of `cuda:N` lie in host memory, and CPU kernels compute with
// them. See pretend_cuda.py.
//
// What is real: dispatch, inference of devices and dtypes, autocast, autograd, inference mode,
// views, module moves. What a GPU would refuse is refused: tensors or generators of two devices in
// one operation, more memory than a device has.
// What is pretended: kernels, speed, streams, fragmentation of memory.

#include <atomic>
#include <chrono>
#include <mutex>
#include <set>
#include <thread>
#include <unordered_map>
#include <vector>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

namespace {

constexpr int kDevices = 2;
constexpr auto kCuda = c10::DeviceType::CUDA;

std::atomic<int64_t> capacity[kDevices] = {80LL << 30, 80LL << 30};  // bytes
std::atomic<int64_t> allocated[kDevices] = {};
std::atomic<int64_t> peak[kDevices] = {};
std::atomic<int64_t> bytes_to_host = 0;    // copied from a device
std::atomic<int64_t> bytes_to_device = 0;  // copied from the host
std::atomic<int64_t> bandwidth = 0;        // bytes a second between host and devices; 0: no waiting

thread_local c10::DeviceIndex current_device = 0;

c10::Device with_index(c10::Device device) {
  return device.has_index() ? device : c10::Device(device.type(), current_device);
}

// ---- memory: each storage on a device owns a storage of the host

struct HostMemory {
  c10::Storage host;
  c10::DeviceIndex device;
  int64_t counted = 0;

  HostMemory(c10::Storage storage, c10::DeviceIndex index)
      : host(std::move(storage)), device(index) {
    count();
  }
  ~HostMemory() { allocated[device] -= counted; }

  // Count the present size; a storage can be resized.
  void count() {
    const int64_t more = static_cast<int64_t>(host.nbytes()) - counted;
    const int64_t total = allocated[device] += more;
    counted += more;
    if (total > capacity[device]) {
      allocated[device] -= counted;
      counted = 0;
      TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", more,
                       " bytes. GPU ", static_cast<int>(device), " has a total capacity of ",
                       capacity[device].load(), " bytes.");
    }
    peak[device] = std::max(peak[device].load(), total);
  }
};

void free_memory(void* context) { delete static_cast<HostMemory*>(context); }

c10::DataPtr device_pointer(c10::Storage host, c10::DeviceIndex device) {
  void* data = host.mutable_data();
  return {data, new HostMemory(std::move(host), device), &free_memory, c10::Device(kCuda, device)};
}

c10::Storage host_storage(size_t bytes) {
  auto* allocator = c10::GetCPUAllocator();
  return c10::Storage(c10::Storage::use_byte_size_t(), bytes, allocator->allocate(bytes), allocator,
                      true);
}

struct DeviceAllocator : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    return device_pointer(host_storage(bytes), current_device);
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* target, const void* source, std::size_t count) const override {
    default_copy_data(target, source, count);
  }
};
DeviceAllocator device_allocator;

HostMemory& memory_of(const c10::Storage& storage) {
  TORCH_INTERNAL_ASSERT(storage.data_ptr().get_deleter() == &free_memory, "a foreign storage");
  return *static_cast<HostMemory*>(storage.data_ptr().get_context());
}

// Give a tensor the sizes of another.
at::Tensor sized_like(at::Tensor made, const at::Tensor& like) {
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) {
    impl->set_wrapped_number(true);
  }
  made._set_conj(like.is_conj());
  made._set_neg(like.is_neg());
  return made;
}

at::Tensor new_tensor(c10::Storage storage, c10::DispatchKey key, const at::Tensor& like) {
  const c10::DispatchKeySet keys(key);
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, like.dtype());
  return sized_like(std::move(made), like);
}

// A view in inference mode is a normal tensor if `base` is.
at::Tensor view_of(const at::Tensor& base, const at::Tensor& like) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(base.storage()), base.key_set(), like.dtype());
  return sized_like(std::move(made), like);
}

at::Tensor on_host(const at::Tensor& tensor) {
  return new_tensor(memory_of(tensor.storage()).host, c10::DispatchKey::CPU, tensor);
}

at::Tensor on_device(const at::Tensor& host, c10::DeviceIndex device) {
  const auto bytes = host.storage().nbytes();
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes,
                       device_pointer(host.storage(), device), &device_allocator, true);
  return new_tensor(std::move(storage), c10::DispatchKey::CUDA, host);
}

// ---- generators: one of the host inside, which has the same numbers

struct DeviceGenerator : c10::GeneratorImpl {
  at::Generator host = at::detail::createCPUGenerator();

  explicit DeviceGenerator(c10::DeviceIndex index)
      : GeneratorImpl(c10::Device(kCuda, index), c10::DispatchKeySet(c10::DispatchKey::CUDA)) {}

  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.seed(); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  void set_state(const c10::TensorImpl& state) override {
    host.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return host.unsafeGetGeneratorImpl()->get_state();
  }
  DeviceGenerator* clone_impl() const override {
    auto* copy = new DeviceGenerator(device_.index());
    copy->host = host.clone();
    return copy;
  }
};

// Those of `torch.cuda.default_generators`.
at::Generator default_generators[kDevices];

at::Generator host_generator(const at::Generator& generator) {
  return static_cast<DeviceGenerator*>(generator.unsafeGetGeneratorImpl())->host;
}

// ---- what torch asks about CUDA

struct Guard : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kCuda; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const auto before = current_device;
    current_device = device.index();
    return {kCuda, before};
  }
  c10::Device getDevice() const override { return {kCuda, current_device}; }
  void setDevice(c10::Device device) const override { current_device = device.index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    current_device = device.index();
  }
  c10::Stream getStream(c10::Device device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

struct Hooks : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  int getNumGPUs() const override { return kDevices; }
  c10::DeviceIndex current_device() const override { return ::current_device; }
  c10::DeviceIndex getCurrentDevice() const override { return ::current_device; }
  void setCurrentDevice(c10::DeviceIndex device) const override { ::current_device = device; }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    return at::make_generator<DeviceGenerator>(index < 0 ? ::current_device : index);
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override {
    return default_generators[index < 0 ? ::current_device : index];
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  c10::Allocator* getCUDADeviceAllocator() const override { return &device_allocator; }
};

// ---- operations

// The device of an operation; raises for arguments of several devices.
class DeviceCheck {
 public:
  explicit DeviceCheck(const c10::OperatorHandle& op) : op_(op) {}

  void add(const at::Tensor& tensor, bool is_index) {
    if (!tensor.defined()) {
      return;
    }
    devices_.push_back(tensor.device());
    if (tensor.is_cuda() && !device_) {
      device_ = tensor.device();
    }
    // CUDA's kernels read CPU scalars and CPU indices.
    const bool is_readable = tensor.is_cpu() && (tensor.dim() == 0 || is_index);
    if (!is_readable) {
      required_.push_back(tensor.device());
    }
  }

  void add(c10::Device device) {
    if (device.is_cuda()) {
      device_ = with_index(device);
    }
  }

  void add(const at::Generator& generator) {
    if (generator.defined()) {
      generators_.push_back(generator.device());
    }
  }

  c10::Device result() const {
    TORCH_INTERNAL_ASSERT(device_, op_.schema().name(), " without a tensor or a device");
    for (const auto& device : required_) {
      if (device != *device_) {
        refuse();
      }
    }
    for (const auto& device : generators_) {
      TORCH_CHECK(device.is_cuda(), "Expected a 'cuda' device type for generator but found '",
                  device.type(), "' (", op_.schema().name(), ")");
    }
    return *device_;
  }

 private:
  [[noreturn]] void refuse() const {
    std::string names;
    for (const auto& device : devices_) {
      names += (names.empty() ? "" : ", ") + device.str();
    }
    TORCH_CHECK(false, "Expected all tensors to be on the same device, but ", op_.schema().name(),
                " got ", names);
  }

  const c10::OperatorHandle& op_;
  std::optional<c10::Device> device_;
  std::vector<c10::Device> devices_, required_, generators_;
};

// Tensors of one call on the host, and back.
class Aliases {
 public:
  at::Tensor host(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cuda()) {
      return tensor;
    }
    auto* impl = tensor.unsafeGetTensorImpl();
    auto known = hosts_.find(impl);
    if (known == hosts_.end()) {
      known = hosts_.emplace(impl, on_host(tensor)).first;
      originals_.emplace(known->second.unsafeGetTensorImpl(), tensor);
    }
    return known->second;
  }

  // A result: an argument itself, a view of an argument, or new.
  at::Tensor device(const at::Tensor& host, c10::Device device) const {
    if (!host.defined()) {
      return host;
    }
    if (auto same = originals_.find(host.unsafeGetTensorImpl()); same != originals_.end()) {
      return same->second;
    }
    for (const auto& [_, tensor] : originals_) {
      if (memory_of(tensor.storage()).host.is_alias_of(host.storage())) {
        return view_of(tensor, host);
      }
    }
    return on_device(host, device.index());
  }

  // Sizes and memory of arguments that the operation resized.
  void update_arguments() const {
    for (const auto& [host_impl, tensor] : originals_) {
      auto* impl = tensor.unsafeGetTensorImpl();
      if (impl->sizes() != host_impl->sizes() || impl->strides() != host_impl->strides()) {
        impl->set_sizes_and_strides(host_impl->sizes(), host_impl->strides(),
                                    host_impl->storage_offset());
      }
      auto& memory = memory_of(tensor.storage());
      if (!memory.host.is_alias_of(host_impl->storage())) {  // `set_`
        memory.host = host_impl->storage();
      }
      auto storage = tensor.storage();
      if (memory.host.data() != storage.data() || memory.host.nbytes() != storage.nbytes()) {
        storage.set_nbytes(memory.host.nbytes());
        storage.set_data_ptr_noswap(device_pointer(memory.host, memory.device));
      }
    }
  }

 private:
  std::unordered_map<c10::TensorImpl*, at::Tensor> hosts_;
  std::unordered_map<c10::TensorImpl*, at::Tensor> originals_;
};

bool reads_cpu_indices(const std::string& name) {
  static const std::set<std::string> names = {
      "aten::index", "aten::_unsafe_index", "aten::index_put", "aten::index_put_",
      "aten::_index_put_impl_"};
  return names.count(name) > 0;
}

// Run any operation by the CPU's kernel.
void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const size_t n_arguments = schema.arguments().size();
  const size_t first = stack->size() - n_arguments;

  // Check the devices.
  DeviceCheck check(op);
  for (size_t i = 0; i < n_arguments; ++i) {
    const c10::IValue& value = (*stack)[first + i];
    const bool is_index = i == 1 && reads_cpu_indices(schema.name());
    if (value.isTensor()) {
      check.add(value.toTensor(), false);
    } else if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorVector()) check.add(tensor, is_index);
    } else if (value.isOptionalTensorList()) {
      for (const auto& tensor : value.toOptionalTensorVector()) {
        check.add(tensor.value_or(at::Tensor()), is_index);
      }
    } else if (value.isDevice()) {
      check.add(value.toDevice());
    } else if (value.isGenerator()) {
      check.add(value.toGenerator());
    }
  }
  const c10::Device device = check.result();

  // Replace what is on the device by its memory on the host.
  Aliases aliases;
  for (size_t i = 0; i < n_arguments; ++i) {
    c10::IValue& value = (*stack)[first + i];
    if (value.isTensor()) {
      value = aliases.host(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> hosts;
      for (const at::Tensor& tensor : value.toTensorVector()) hosts.push_back(aliases.host(tensor));
      value = hosts;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> hosts;
      for (const auto& tensor : value.toOptionalTensorVector()) {
        hosts.push_back(tensor ? std::optional(aliases.host(*tensor)) : std::nullopt);
      }
      value = hosts;
    } else if (value.isStorage() && value.toStorage().device_type() == kCuda) {
      value = memory_of(value.toStorage()).host;
    } else if (value.isDevice()) {
      value = c10::Device(c10::DeviceType::CPU);
    } else if (value.isGenerator()) {
      value = host_generator(value.toGenerator());
    } else if (value.isNone() && schema.arguments()[i].name() == "generator") {
      value = host_generator(default_generators[device.index()]);
    }
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  aliases.update_arguments();

  // Results.
  const size_t n_results = schema.returns().size();
  for (size_t i = stack->size() - n_results; i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = aliases.device(value.toTensor(), device);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> results;
      for (const at::Tensor& tensor : value.toTensorVector()) {
        results.push_back(aliases.device(tensor, device));
      }
      value = results;
    }
  }
}

// Convolutions of float16 in float32, which is much faster on CPUs without float16 arithmetic.
void run_convolution(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const size_t first = stack->size() - op.schema().arguments().size();
  bool all_half = true;
  for (size_t i = first; i < first + 3; ++i) {  // input, weight, bias
    const c10::IValue& value = (*stack)[i];
    all_half = all_half && (value.isNone() || value.toTensor().scalar_type() == at::kHalf);
  }
  if (!all_half) {
    return run(op, stack);
  }
  for (size_t i = first; i < first + 3; ++i) {
    c10::IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = value.toTensor().to(at::kFloat);
    }
  }
  run(op, stack);
  stack->back() = stack->back().toTensor().to(at::kHalf);
}

at::Tensor& copy_(at::Tensor& target, const at::Tensor& source, bool non_blocking) {
  if (target.is_cpu() != source.is_cpu()) {
    const auto bytes = static_cast<int64_t>(source.nbytes());
    (target.is_cuda() ? bytes_to_device : bytes_to_host) += bytes;
    if (const int64_t rate = bandwidth) {
      std::this_thread::sleep_for(std::chrono::microseconds(bytes * 1'000'000 / rate));
    }
  }
  Aliases aliases;
  aliases.host(target).copy_(aliases.host(source), non_blocking);
  return target;
}

// CUDA softmax accumulates half precision in float32, and may return that.
at::Tensor softmax(const at::Tensor& input, int64_t dim, bool half_to_float) {
  Aliases aliases;
  const auto host = aliases.host(input);
  const auto result = half_to_float ? host.softmax(dim, at::kFloat) : host.softmax(dim);
  return aliases.device(result, input.device());
}

at::Tensor log_softmax(const at::Tensor& input, int64_t dim, bool half_to_float) {
  Aliases aliases;
  const auto host = aliases.host(input);
  const auto result = half_to_float ? host.log_softmax(dim, at::kFloat) : host.log_softmax(dim);
  return aliases.device(result, input.device());
}

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run>());
}

// A torch with CUDA has kernels that need a GPU: none of them may run.
struct NoWarning : c10::WarningHandler {  // that kernels are replaced
  void process(const c10::Warning&) override {}
};

const auto replaced = [] {
  NoWarning no_warning;
  c10::WarningUtils::WarningHandlerGuard quiet(&no_warning);
  auto& dispatcher = c10::Dispatcher::singleton();
  std::vector<c10::RegistrationHandleRAII> kernels;
  for (const auto& name : dispatcher.getAllOpNamesForDispatchKey(c10::DispatchKey::CUDA)) {
    kernels.push_back(dispatcher.registerImpl(
        name, c10::DispatchKey::CUDA, c10::KernelFunction::makeFromBoxedFunction<&run>(),
        std::nullopt, nullptr, "pretended CUDA"));
  }
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(nullptr);  // attention by matmul
  return kernels;
}();

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("copy_", &copy_);
  library.impl("_softmax", &softmax);
  library.impl("_log_softmax", &log_softmax);
  // Their kernels for all devices look for a CUDA library.
  library.impl("convolution", torch::CppFunction::makeFromBoxedFunction<&run_convolution>());
  library.impl("convolution_backward", torch::CppFunction::makeFromBoxedFunction<&run>());
}

const int registered = [] {
  const auto create = [](at::CUDAHooksArgs arguments) {
    return std::unique_ptr<at::CUDAHooksInterface>(new Hooks(arguments));
  };
  at::CUDAHooksRegistry()->Register("CUDAHooks", create, c10::REGISTRY_PREFERRED);
  c10::SetAllocator(kCuda, &device_allocator, 255);
  return 0;
}();

}  // namespace

// ---- for pretend_cuda.py

extern "C" {
int64_t pretend_allocated(int device) { return allocated[device]; }
int64_t pretend_peak(int device) { return peak[device]; }
int64_t pretend_capacity(int device) { return capacity[device]; }
void pretend_set_capacity(int device, int64_t bytes) { capacity[device] = bytes; }
void pretend_set_bandwidth(int64_t bytes) { bandwidth = bytes; }
int64_t pretend_bytes_to_host() { return bytes_to_host; }
int64_t pretend_bytes_to_device() { return bytes_to_device; }
int pretend_current_device() { return current_device; }
void pretend_set_default_generator(int device, c10::GeneratorImpl* generator) {
  auto shared = c10::intrusive_ptr<c10::GeneratorImpl>::reclaim_copy(generator);
  default_generators[device] = at::Generator(std::move(shared));
}
int pretend_exchange_device(int device) {
  const int before = current_device;
  current_device = static_cast<c10::DeviceIndex>(device);
  return before;
}
}
