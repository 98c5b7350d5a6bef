// One step of generalised advantage estimation (Schulman et al., arXiv 1506.02438, equation 16) and of its adjoint.
//
// delta_k = r_k + gamma V_{k+1} - V_k,   A_k = delta_k + gamma lambda A_{k+1},   returns_k = A'_k + V_k
// with A' the same recursion at the critic's own lambda.
#pragma once

#include "../ops.h"
#include "inline.h"

namespace lacfast {

LACFAST_INLINE std::int64_t steps_of(const Gae& op) { return op.rewards.sizes[1]; }
LACFAST_INLINE std::int64_t heads_of(const Gae& op) { return op.rewards.sizes[2]; }

template <typename A>
struct GaeDecay {
  A gamma;
  A policy;  // gamma * gae_lambda
  A value;   // gamma * value_lambda
};

// Runs backwards over the steps of one chain; starts as zeros after the last step.
template <typename A>
struct GaeState {
  A next_value, advantage, value_advantage;
};

template <typename A>
LACFAST_INLINE A gae_delta(A reward, A value, A next_value, const GaeDecay<A>& decay) {
  return reward + decay.gamma * next_value - value;
}

template <typename A>
LACFAST_INLINE void gae_step(GaeState<A>& state, A reward, A value, const GaeDecay<A>& decay) {
  const A delta = gae_delta(reward, value, state.next_value, decay);
  state.advantage = delta + decay.policy * state.advantage;
  state.value_advantage = delta + decay.value * state.value_advantage;
  state.next_value = value;
}

// Runs forwards: the gradient of delta_k gathers those of every earlier advantage and return.
template <typename A>
struct GaeAdjoint {
  A policy, value, previous_delta;
};

template <typename A>
struct GaeGradient {
  A reward, value;
};

template <typename A>
LACFAST_INLINE GaeGradient<A> gae_adjoint_step(GaeAdjoint<A>& state, A grad_advantage, A grad_return,
                                               const GaeDecay<A>& decay) {
  state.policy = grad_advantage + decay.policy * state.policy;
  state.value = grad_return + decay.value * state.value;
  const A grad_delta = state.policy + state.value;
  const A grad_value = grad_return - grad_delta + decay.gamma * state.previous_delta;
  state.previous_delta = grad_delta;
  return {grad_delta, grad_value};
}

}  // namespace lacfast
