// A second device whose memory is the machine's own and whose numbers are the CPU's: "card" for torch.
//
// Tensors on it are tensors of another device in every respect: an operation whose tensors lie on both raises, with the
// exceptions that CUDA makes (a number that lies on the CPU as a tensor; positions on the CPU that index a tensor there).
// Each operation runs as the CPU's own kernel on the same bytes, so results are those of the CPU to the bit.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/GeneratorForPrivateuseone.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/alias_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <unordered_set>

namespace {

constexpr auto CARD = c10::DeviceType::PrivateUse1;
const c10::Device THE_CARD(CARD, 0);

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    void* data = n ? std::malloc(n) : nullptr;
    TORCH_CHECK(data || !n, "no memory for ", n, " bytes");
    return {data, data, &std::free, THE_CARD};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, std::size_t n) const override { std::memcpy(to, from, n); }
};
Allocator allocator;
REGISTER_ALLOCATOR(CARD, &allocator)

struct Guard final : c10::impl::NoOpDeviceGuardImpl<CARD> {
  c10::Device exchangeDevice(c10::Device) const override { return THE_CARD; }
  c10::Device getDevice() const override { return THE_CARD; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, THE_CARD); }
  c10::Stream getNewStream(c10::Device, int) const override { return c10::Stream(c10::Stream::DEFAULT, THE_CARD); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, THE_CARD); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
};
const bool hooked = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  return true;
}();

bool on_card(const at::Tensor& t) { return t.defined() && t.device().type() == CARD; }

// The same bytes as a tensor of the CPU.
at::Tensor below(const at::Tensor& t) {
  if (!on_card(t)) return t;
  auto options = at::TensorOptions().dtype(t.dtype()).device(at::kCPU);
  if (t._is_zerotensor()) return at::zeros(t.sizes(), options);
  if (t.numel() == 0) return at::empty_strided(t.sizes(), t.strides(), options);
  auto same = at::from_blob(t.data_ptr(), t.sizes(), t.strides(), options);
  if (t.is_conj()) same._set_conj(true);
  if (t.is_neg()) same._set_neg(true);
  return same;
}

// A result of the CPU's kernel as a tensor of the card, which keeps it.
at::Tensor above(const at::Tensor& given) {
  if (!given.defined() || on_card(given)) return given;
  const auto t = given._is_zerotensor() ? at::zeros(given.sizes(), given.options()) : given;
  auto* kept = new at::Tensor(t);
  c10::DataPtr data(t.storage().mutable_data(), kept, [](void* p) { delete static_cast<at::Tensor*>(p); }, THE_CARD);
  c10::Storage storage(c10::Storage::use_byte_size_t{}, t.storage().nbytes(), std::move(data), &allocator, true);
  auto out = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), t.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  if (t.is_conj()) out._set_conj(true);
  if (t.is_neg()) out._set_neg(true);
  return out;
}

const at::Tensor& grown(const at::Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  size_t needed = (self.storage_offset() + self.numel()) * self.itemsize();
  auto storage = impl->storage();
  if (storage.nbytes() < needed) {
    auto data = allocator.allocate(needed);
    if (storage.nbytes()) std::memcpy(data.get(), storage.data(), storage.nbytes());
    storage.set_data_ptr(std::move(data));
    storage.set_nbytes(needed);
  }
  return self;
}

// Where CUDA takes what lies on the CPU beside its own: positions.
const std::unordered_set<std::string> INDEXING = {
    "aten::index", "aten::_unsafe_index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"};

void run_on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const size_t n_args = schema.arguments().size(), first = stack->size() - n_args;
  std::vector<c10::IValue> given(stack->begin() + first, stack->end());
  bool any = false, self_on_card = false;
  std::string elsewhere;
  auto look = [&](const at::Tensor& t, size_t i) {
    if (!t.defined()) return;
    if (on_card(t)) {
      any = true;
      if (i == 0) self_on_card = true;
    } else if (t.dim() > 0) {
      elsewhere = schema.arguments()[i].name();
    }
  };
  for (size_t i = 0; i < n_args; ++i) {
    auto& value = (*stack)[first + i];
    if (value.isTensor()) {
      look(value.toTensor(), i);
      value = below(value.toTensor());
    } else if (value.isTensorList()) {
      auto list = value.toTensorVector();
      for (auto& t : list) {
        look(t, i);
        t = below(t);
      }
      value = c10::IValue(c10::List<at::Tensor>(list));
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (std::optional<at::Tensor> t : value.toOptionalTensorList()) {
        if (t) look(*t, i);
        list.push_back(t ? std::optional<at::Tensor>(below(*t)) : t);
      }
      value = c10::IValue(list);
    } else if (value.isDevice() && value.toDevice().type() == CARD) {
      value = c10::IValue(c10::Device(at::kCPU));
    } else if (value.isGenerator()) {
      TORCH_CHECK(value.toGenerator().device().type() == CARD, "Expected a 'card' device type for generator but found 'cpu'");
    }
  }
  TORCH_CHECK(
      elsewhere.empty() || !any || (self_on_card && INDEXING.count(schema.name())),
      "Expected all tensors to be on the same device, but found at least two devices, card:0 and cpu! (when checking argument ",
      elsewhere, " of ", schema.name(), ")");
  op.callBoxed(stack);
  const size_t n_returns = schema.returns().size(), out = stack->size() - n_returns;
  for (size_t i = 0; i < n_returns; ++i) {
    auto& value = (*stack)[out + i];
    const auto* alias = schema.returns()[i].alias_info();
    if (alias && alias->isWrite()) {  // what was written into is what was given
      for (size_t k = 0; k < n_args; ++k) {
        const auto* mine = schema.arguments()[k].alias_info();
        if (!mine || mine->beforeSets() != alias->beforeSets()) continue;
        if (value.isTensor() && on_card(given[k].toTensor())) {
          auto target = given[k].toTensor();
          auto now = value.toTensor();
          if (now.sizes() != target.sizes()) {
            grown(target, now.sizes(), std::nullopt);
            below(target).copy_(now);
          }
        }
        value = given[k];
      }
    } else if (value.isTensor()) {
      if (alias && any) {
        TORCH_CHECK(false, schema.name(), " is a view that this card does not know");
      }
      value = above(value.toTensor());
    } else if (value.isTensorList()) {
      auto list = value.toTensorVector();
      for (auto& t : list) t = above(t);
      value = c10::IValue(c10::List<at::Tensor>(list));
    }
  }
}

at::Tensor empty(
    at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(
      size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool) {
  below(to).copy_(below(self));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  if (on_card(to)) grown(to, self.sizes(), std::nullopt);
  else to.resize_(self.sizes());
  return copy_from(self, to, false);
}

int64_t attention(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double, bool,
    std::optional<double>, bool) {
  return 0;  // as it is written down: by matrix products
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_sizes_and_strides(size, stride.empty() ? at::IntArrayRef(at::detail::defaultStrides(size)) : stride, offset);
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage source) {
  const int64_t n = source.nbytes() / self.itemsize();
  return set_storage(self, std::move(source), 0, {n}, {});
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_the_cpu>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("unfold", TORCH_FN(at::native::unfold));
  m.impl("resize_", TORCH_FN(grown));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
  m.impl("set_.source_Storage", TORCH_FN(set_whole_storage));
  m.impl("_copy_from", TORCH_FN(copy_from));
  m.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
  m.impl("_fused_sdp_choice", TORCH_FN(attention));
}

}  // namespace
