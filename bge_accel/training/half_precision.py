"""Training in bfloat16 throughout, with float32 weights for the optimiser.

Under autocast each product casts its weights and each norm its input, over and over. Here a bfloat16 copy of the model
does the forward and backward pass, and the float32 model next to it, which is optimised and saved, gets its gradients and
gives its weights back after each step: a bfloat16 weight alone would round small steps away (Micikevicius et al. 2018,
https://arxiv.org/abs/1710.03740, section 3.1).
"""

import copy

import torch


class Bf16Copy:
    """A bfloat16 model that follows a float32 one.

    Args:
        master: the float32 model, whose parameters the optimiser holds.
    """

    def __init__(self, master: torch.nn.Module) -> None:
        self.model = copy.deepcopy(master).to(torch.bfloat16)
        pairs = zip(master.parameters(), self.model.parameters(), strict=True)
        self.pairs = [(of_master, own) for of_master, own in pairs if of_master.requires_grad]

    @torch.no_grad()
    def move_gradients(self) -> None:
        """Adds the copy's gradients to the master's, in float32, and forgets them."""
        for of_master, own in self.pairs:
            if own.grad is None:
                continue
            if of_master.grad is None:
                of_master.grad = own.grad.float()
            else:
                of_master.grad += own.grad
            own.grad = None

    @torch.no_grad()
    def take_weights(self) -> None:
        """The master's weights, rounded; call it after every change of them."""
        torch._foreach_copy_([own for _, own in self.pairs], [of_master for of_master, _ in self.pairs])
