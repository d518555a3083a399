//! What cannot be routed, and what can be routed but should not be trained: a router that learns nothing, or that is not what
//! its name says.

use super::{
    Activation, HashTable, Noise, Normalize, Policy, RouterConfig, SecondChoice, ZeroComputation, config_error,
    non_negative,
};
use crate::error::RoutingError;

impl RouterConfig {
    /// Refuses what cannot be routed with `experts` experts and `top_k` choices.
    pub fn validate(&self, experts: usize, top_k: usize) -> Result<(), RoutingError> {
        if experts == 0 {
            return Err(RoutingError::NoExperts);
        }
        if top_k == 0 || top_k > experts {
            return Err(RoutingError::TopK { top_k, experts });
        }
        non_negative("capacity_factor", self.capacity_factor)?;
        non_negative("eval_capacity_factor", self.eval_capacity_factor)?;
        if !(self.weight_scale.is_finite() && self.weight_scale != 0.0) {
            return Err(config_error("weight_scale", self.weight_scale, "a finite number other than 0"));
        }
        if self.capacity_multiple == 0 {
            return Err(config_error("capacity_multiple", 0, "at least 1"));
        }
        match self.noise {
            Noise::None => {}
            Noise::Softplus { floor } => non_negative("noise.softplus.floor", floor)?,
            Noise::Normal { scale } => non_negative("noise.normal.scale", scale)?,
            Noise::Jitter { eps } if (0.0..1.0).contains(&eps) => {}
            Noise::Jitter { eps } => return Err(config_error("noise.jitter.eps", eps, "0 <= eps < 1")),
        }
        if self.hash_table != HashTable::Modulo && self.policy != Policy::Hash {
            let name = if self.hash_table == HashTable::Random { "random" } else { "balanced" };
            return Err(config_error("hash_table", name, "\"modulo\": only policy = \"hash\" has a table"));
        }
        self.validate_policy(experts, top_k)
    }

    /// Refuses what can be routed but not be trained as it stands: a key that contradicts the policy it is given with, and
    /// weights that are constant, so that the task never moves the router.
    ///
    /// Models that were trained elsewhere, or before this was refused, are only held to [`validate`](Self::validate).
    pub fn validate_training(
        &self,
        experts: usize,
        top_k: usize,
        zero: Option<&ZeroComputation>,
    ) -> Result<(), RoutingError> {
        self.validate(experts, top_k)?;
        self.is_what_it_is_called()?;
        if self.policy == Policy::Hash || experts == 1 {
            return Ok(()); // Nothing to decide, so nothing to learn.
        }
        if self.policy == (Policy::SparseMixer { eps: 0.0 }) {
            let reason = "above 0 (0.01 in Phi-3.5-MoE), or policy = \"top_k\": with 0 only the largest logit takes part, its \
                          weight is always 1, and the task gives the router no gradient";
            return Err(config_error("policy.sparse_mixer.eps", 0, reason));
        }
        if self.policy.most_per_token(experts, top_k) > 1 {
            return Ok(());
        }
        let because = "a token has one expert, whose weight divided by itself is always 1, so the task gives the router no gradient";
        if zero.is_some_and(|zero| zero.renorm_after_zero) {
            let reason = format!("false, or top_k >= 2: {because}");
            return Err(config_error("zero_computation.renorm_after_zero", true, &reason));
        }
        if self.activation == Activation::SoftmaxSelected {
            let reason = format!("\"softmax\" with normalize = false, or top_k >= 2: {because}");
            return Err(config_error("activation", "softmax_selected", &reason));
        }
        let value = match self.normalize {
            Normalize::Never => return Ok(()),
            Normalize::BeforeDrop => "true",
            Normalize::AfterDrop => "after_drop",
        };
        let other = match self.policy {
            Policy::TopK | Policy::NoisyTopK | Policy::GroupLimited { .. } | Policy::Sinkhorn => {
                "top_k >= 2".to_string()
            }
            Policy::TopP { .. } => format!("policy.top_p.mass above 1/{experts}"),
            Policy::ExpertChoiceCapped { .. } => "policy.expert_choice_capped.cap >= 2".to_string(),
            _ => "policy = \"top_k\" with top_k >= 2".to_string(),
        };
        Err(config_error("normalize", value, &format!("false, or {other}: {because}")))
    }

    /// Refuses keys that make the policy another one than its name and its paper say.
    fn is_what_it_is_called(&self) -> Result<(), RoutingError> {
        let name = self.policy.name();
        let raw = matches!(
            self.policy,
            Policy::Switch
                | Policy::SampledTop1
                | Policy::ExpertChoice
                | Policy::ExpertChoiceCapped { .. }
                | Policy::Relu
        );
        if raw && self.normalize != Normalize::Never {
            let value = if self.normalize == Normalize::BeforeDrop { "true" } else { "after_drop" };
            let (weights, other) = match self.policy {
                Policy::Switch | Policy::SampledTop1 => (
                    "raw probabilities; divided by their sum they would all be 1 and the router would learn nothing",
                    "top_k\" with top_k >= 2",
                ),
                Policy::Relu => ("the positive logits themselves", "top_k\" with activation = \"relu\""),
                _ => ("raw probabilities", "batchwise\", which divides them"),
            };
            let reason =
                format!("false, since the weights of policy = \"{name}\" are {weights}; or policy = \"{other}");
            return Err(config_error("normalize", value, &reason));
        }
        let expected = match self.policy {
            Policy::Switch | Policy::SampledTop1 => {
                Some((Activation::Softmax, "softmax", "probabilities of a softmax over all experts"))
            }
            Policy::Base => {
                Some((Activation::Sigmoid, "sigmoid", "sigmoids, what they lack to 1 going to the token itself"))
            }
            _ => None,
        };
        if let Some((activation, word, weights)) = expected
            && self.activation != activation
        {
            let reason =
                format!("\"{word}\", since the weights of policy = \"{name}\" are {weights}; or another policy");
            return Err(config_error("activation", self.activation.name(), &reason));
        }
        if self.policy == Policy::NoisyTopK && !matches!(self.noise, Noise::Softplus { .. }) {
            let reason = "\"softplus\", the learned noise that policy = \"noisy_top_k\" is named after; or policy = \"top_k\", \
                          which goes with any noise and with none";
            return Err(config_error("noise", self.noise.name(), reason));
        }
        Ok(())
    }

    fn validate_policy(&self, experts: usize, top_k: usize) -> Result<(), RoutingError> {
        let exactly = |name: &'static str, k: usize| match top_k == k {
            true => Ok(()),
            false => Err(config_error("policy", name, &format!("top_k = {k}, found top_k = {top_k}"))),
        };
        match self.policy {
            Policy::Switch => exactly("switch", 1)?,
            Policy::SampledTop1 => exactly("sampled_top1", 1)?,
            Policy::Base => exactly("base", 1)?,
            Policy::Gshard { second } => {
                exactly("gshard", 2)?;
                if let SecondChoice::Threshold(t) = second
                    && !(t > 0.0 && t.is_finite())
                {
                    return Err(config_error("policy.gshard.second.threshold", t, "a finite number > 0"));
                }
            }
            Policy::SampledSecond => exactly("sampled_second", 2)?,
            Policy::SparseMixer { eps } => {
                exactly("sparse_mixer", 2)?;
                non_negative("policy.sparse_mixer.eps", eps)?;
            }
            Policy::TopP { mass } if !(mass > 0.0 && mass <= 1.0) => {
                return Err(config_error("policy.top_p.mass", mass, "0 < mass <= 1"));
            }
            Policy::TopP { .. } if !self.activation.is_softmax() => {
                return Err(config_error("policy", "top_p", "probabilities: activation = \"softmax\""));
            }
            Policy::Relu if self.activation != Activation::Relu => {
                return Err(config_error("policy", "relu", "activation = \"relu\""));
            }
            Policy::GroupLimited { groups, keep } => {
                if groups == 0 || !experts.is_multiple_of(groups) {
                    return Err(RoutingError::Groups { groups, experts });
                }
                if keep == 0 || keep > groups {
                    return Err(config_error(
                        "policy.group_limited.keep",
                        keep,
                        &format!("1 to {groups}, the number of groups"),
                    ));
                }
                if keep * (experts / groups) < top_k {
                    let room =
                        format!("groups that hold top_k = {top_k} experts, found {} experts in each", experts / groups);
                    return Err(config_error("policy.group_limited.keep", keep, &room));
                }
            }
            Policy::Hierarchical { groups, keep } => self.validate_levels(experts, top_k, groups, keep)?,
            Policy::ExpertChoiceCapped { cap } if cap == 0 => {
                return Err(config_error("policy.expert_choice_capped.cap", cap, "at least 1"));
            }
            _ => {}
        }
        if self.policy == Policy::NoisyTopK && top_k == 1 && self.activation == Activation::SoftmaxSelected {
            return Err(config_error(
                "policy",
                "noisy_top_k",
                "top_k >= 2 or policy = \"switch\": the softmax over one expert is always 1 and its gate gets no gradient",
            ));
        }
        Ok(())
    }

    fn validate_levels(&self, experts: usize, top_k: usize, groups: usize, keep: usize) -> Result<(), RoutingError> {
        if groups == 0 || !experts.is_multiple_of(groups) {
            return Err(RoutingError::Groups { groups, experts });
        }
        let per_group = experts / groups;
        if keep == 0 || keep > groups {
            return Err(config_error("policy.hierarchical.keep", keep, &format!("1..={groups}")));
        }
        if !top_k.is_multiple_of(keep) || top_k / keep > per_group {
            let reason =
                format!("a keep of which top_k = {top_k} is 1 to {per_group} times as many, the experts of a group");
            return Err(config_error("policy.hierarchical.keep", keep, &reason));
        }
        if (keep == 1 && groups > 1) || (top_k == keep && per_group > 1) {
            let reason = "at least two groups and two experts in each: a softmax over one choice is always 1 and gets no gradient";
            return Err(config_error("policy.hierarchical.keep", keep, reason));
        }
        if self.activation != Activation::SoftmaxSelected {
            return Err(config_error("policy", "hierarchical", "activation = \"softmax_selected\", on both levels"));
        }
        if self.normalize == Normalize::AfterDrop {
            return Err(config_error(
                "normalize",
                "after_drop",
                "true or false: the weights of policy = \"hierarchical\" are products",
            ));
        }
        Ok(())
    }
}
